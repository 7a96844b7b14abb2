"""Contenders that each have a process of their own, and take turns.

Each turn runs alone, so that the machine's drift falls on all alike, and no contender's memory is another's.
"""

import multiprocessing
from collections.abc import Callable, Iterator
from pathlib import Path

from tqdm import tqdm


def memory_kb(field: str) -> int:
    """A value in kB from this process's status file; 0 if the system has none."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) for line in lines if line.startswith(field + ":")), 0)


def _worker(turns: Callable[..., Iterator[dict]], arguments: tuple, pipe) -> None:
    try:
        iterator = turns(*arguments)
        pipe.send(next(iterator))
        while pipe.recv() == "turn":
            pipe.send(next(iterator))
    except Exception as error:
        pipe.send({"failed": f"{type(error).__name__}: {error}"})


class Contender:
    """One process and what its turns took.

    ``turns(*arguments)`` is a generator of a module that the process imports. It yields once when it is ready, what is
    known of the contender (``about``), and then a dict for each turn. ``failed`` says why there are no more turns.
    """

    def __init__(self, name: str, timeout: float, turns: Callable[..., Iterator[dict]], *arguments):
        self.name, self.timeout, self.turns, self.failed = name, timeout, [], ""
        # A forked child would share the parent's thread pool and what it has computed. The process that these are
        # forked from has only imported what takes seconds.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch", "transformers.models.llama.modeling_llama"])
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_worker, args=(turns, arguments, theirs), daemon=True)
        self.process.start()
        self.about = self._receive()

    def _receive(self) -> dict:
        message = {"failed": f"no answer within {self.timeout} s"}
        if self.pipe.poll(self.timeout):
            try:
                message = self.pipe.recv()
            except EOFError:
                message = {"failed": "its process ended"}
        self.failed = self.failed or message.get("failed", "")
        return message

    def turn(self) -> None:
        """Take one more turn, unless the contender has failed."""
        if self.failed:
            return
        self.pipe.send("turn")
        message = self._receive()
        if not self.failed:
            self.turns.append(message)

    @property
    def timed(self) -> list[dict]:
        """The turns after the first, which warms up; that one where it is the only one."""
        return self.turns[1:] or self.turns

    def close(self) -> None:
        """End the process."""
        if self.process.is_alive():
            self.process.kill()
        self.process.join()


def take_turns(contenders: list[Contender], rounds: int, title: str) -> None:
    """Let each contender take ``rounds`` turns after one that warms up, and end their processes."""
    try:
        with tqdm(total=len(contenders) * (rounds + 1), unit="turn", desc=title, disable=None) as bar:
            for _ in range(rounds + 1):
                for contender in contenders:
                    bar.set_postfix_str(contender.name)
                    contender.turn()
                    bar.update()
    finally:
        for contender in contenders:
            contender.close()

"""How calls of the CPU kernels are shared among threads (csrc/cpu/pool.h; tests/native/pool.cpp has the rest)."""

import os
import subprocess
import sys
import threading

import forked
import pytest
import torch
from cases import make_weight

import lowbit
from lowbit.backends import native

pytestmark = pytest.mark.skipif(native.missing_reason() is not None, reason="no compiled extension")

#: Large enough that a caller of the pool asks for help: it works alone for 50 us first.
SHAPE = (2048, 1024)


@pytest.fixture
def threads():
    """Sets the number of threads, and sets it back."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def operands(rows: int) -> tuple[torch.Tensor, lowbit.QuantizedTensor]:
    x = torch.randn(rows, SHAPE[1], generator=torch.Generator().manual_seed(rows))
    return x, lowbit.quantize(make_weight(SHAPE))


def in_process(program: str, **environment: str) -> str:
    """What a new Python prints that runs ``program`` after the imports."""
    imports = """import os, torch, lowbit
q = lowbit.quantize(torch.randn(2048, 1024, generator=torch.Generator().manual_seed(0)))
x = torch.ones(8, 1024)
"""
    done = subprocess.run(
        [sys.executable, "-c", imports + program],
        cwd=os.path.expanduser("~"),  # not the sources, which may have no extension
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env=os.environ | environment,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.parametrize("rows", [1, 4, 64])
def test_pieces_do_not_change_results(rows, threads):
    """A run on a machine with other cores must give the same bits, whoever computed which piece."""
    (x, q), results = operands(rows), []
    x.requires_grad_()
    for count in (1, 2, 3, 7):
        threads(count)
        y = lowbit.linear(x, q)
        decoded, again = lowbit.dequantize(q), lowbit.quantize(q.dequantize())
        results.append((y, *torch.autograd.grad(y.square().sum(), x), decoded, again.packed))
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], result, strict=True))


def test_many_threads_call_at_once(threads):
    """A server's threads share one model, and each must get its own product."""
    threads(2)
    cases = [operands(rows) for rows in (1, 2, 4, 8, 16, 32)]
    expected = [lowbit.linear(x, q) for x, q in cases]
    wrong = []

    def call(i: int) -> None:
        torch.set_num_threads(2)  # OpenMP's number is each thread's own
        for _ in range(20):
            if not torch.equal(lowbit.linear(*cases[i]), expected[i]):
                wrong.append(i)

    callers = [threading.Thread(target=call, args=(i,)) for i in range(len(cases))]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not wrong


def test_a_forked_child_shares_its_calls(threads):
    """A fork has none of its parent's threads: a call that waited for one of them would never end."""
    threads(3)
    x, q = operands(4)
    expected = lowbit.linear(x, q)

    def multiply() -> int:
        import signal

        signal.alarm(60)
        right = all(torch.equal(lowbit.linear(x, q), expected) for _ in range(20))
        helpers = len(os.listdir("/proc/self/task")) - 1 if os.path.isdir("/proc/self/task") else 2
        grandchild = forked.in_child(lambda: 0 if torch.equal(lowbit.linear(x, q), expected) else 1)
        return 0 if right and helpers == 2 and grandchild == 0 else 1

    assert forked.in_child(multiply) == 0
    assert torch.equal(lowbit.linear(x, q), expected)


def test_a_forked_child_with_callers_at_once(threads):
    """Several threads of a child share the one pool."""
    threads(3)
    cases = [operands(rows) for rows in (1, 4, 16)]
    expected = [lowbit.linear(x, q) for x, q in cases]

    def multiply() -> int:
        wrong = []

        def call(i: int) -> None:
            torch.set_num_threads(3)
            wrong.extend(i for _ in range(20) if not torch.equal(lowbit.linear(*cases[i]), expected[i]))

        callers = [threading.Thread(target=call, args=(i % 3,)) for i in range(12)]
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join()
        return len(wrong)

    assert forked.in_child(multiply) == 0


@pytest.mark.slow
@pytest.mark.parametrize("fork", [False, True], ids=["team", "pool"])
def test_a_process_ends_while_threads_multiply(fork):
    """A program that ends with a daemon thread in a product must neither crash nor hang.

    The product is one that takes seconds: Python before 3.14 ends a thread that returns to it now, which C++ does not
    survive, in torch's own products as in ours.
    """
    program = """
import sys, threading, time
q = lowbit.quantize(torch.ones(4096, 8192))
x = torch.ones(8192, 8192)
torch.set_num_threads(3)
def multiply():
    torch.set_num_threads(3)
    began.release()
    lowbit.linear(x, q)
    print("returned", flush=True)
began = threading.Semaphore(0)
for _ in range(2):
    threading.Thread(target=multiply, daemon=True).start()
    began.acquire()
lowbit.linear(x[:8], q)
time.sleep(0.1)
print("end", flush=True)
sys.exit(0)
"""
    if fork:
        program = "if child := os.fork():\n    sys = __import__('sys'); sys.exit(os.waitpid(child, 0)[1])\n" + program
    assert in_process(program) == "end\n"


@pytest.mark.slow
def test_one_thread_starts_no_other():
    """Whoever asks for one thread, as a DataLoader's workers do, has its other cores for something else."""
    if not os.path.isdir("/proc/self/task"):
        pytest.skip("counts the threads in /proc")
    counts = in_process(
        "torch.set_num_threads(1)\n"
        "before = len(os.listdir('/proc/self/task'))\n"
        "child = os.fork()\n"
        "if child: os.waitpid(child, 0)\n"
        "for _ in range(50): lowbit.linear(x, q)\n"
        "if not child: print(len(os.listdir('/proc/self/task')), flush=True); os._exit(0)\n"
        "print(len(os.listdir('/proc/self/task')) - before)\n"
    )
    assert counts.split() == ["1", "0"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "environment",
    [
        {"OMP_NUM_THREADS": "3", "OMP_WAIT_POLICY": "PASSIVE"},
        {"OMP_NUM_THREADS": "3", "OMP_WAIT_POLICY": "ACTIVE", "OMP_DYNAMIC": "TRUE"},
        {"OMP_NUM_THREADS": "8", "OMP_THREAD_LIMIT": "2"},
    ],
    ids=lambda environment: ",".join(environment.values()),
)
def test_settings_of_openmp(environment):
    """Settings may give a call fewer threads than it counts on; all of its pieces must be computed all the same."""
    weight = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    expected = lowbit.linear(torch.ones(8, SHAPE[1]), lowbit.quantize(weight)).double().sum().item()
    program = "print({lowbit.linear(x, q).double().sum().item() for _ in range(5)})"
    assert in_process(program, **environment) == f"{{{expected}}}\n"


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="Linux's affinities")
def test_affinity_is_left_alone():
    """A program that keeps to some cores, as numactl makes it do, is not moved to others."""
    core = min(os.sched_getaffinity(0))
    printed = in_process(
        f"os.sched_setaffinity(0, {{{core}}})\n"
        "torch.set_num_threads(3)\n"
        "for _ in range(5): lowbit.linear(x, q)\n"
        "child = os.fork()\n"
        "if child: os.waitpid(child, 0)\n"
        "lowbit.linear(x, q)\n"
        "masks = {tuple(os.sched_getaffinity(int(t))) for t in os.listdir('/proc/self/task')}\n"
        "print(masks, flush=True)\n"
        "os._exit(0)\n"
    )
    # A thread pool that began before, with more cores, keeps them.
    assert f"{{({core},)}}\n" == printed.splitlines(keepends=True)[0]

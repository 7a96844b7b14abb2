"""The optimizer that all others here are settings of: torch's interface over one fused step of all parameters."""

import math
import os
import pickle
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import chain
from operator import is_
from typing import Any

import torch

from lowbit.checks import check_choice, check_switch
from lowbit.files.replaced import replaced
from lowbit.optim import Constants, constants, optimizer_step

from .arena import Arena
from .calls import Call, common_norm, contiguous, dense_gradients, local_parts
from .groups import check_group
from .offload import Offload
from .states import DTensor, StatesOf, copy_state

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass
class _Memory:
    """What a parameter's states are, and where: (segment, offset) in the arena of its device."""

    states: StatesOf
    place: tuple[int, int]


class FusedOptimizer(torch.optim.Optimizer):
    """A torch optimizer whose states lie in one arena for each device, and whose step is one call.

    Args:
        params: parameters or groups of them, as torch's optimizers take; float32, bfloat16 or float16.
        lr, betas, eps, weight_decay: as in torch's AdamW; also settings of a group.
        bits: of the states: 32, or 8 (in blocks of 256; parameters of fewer than 4,096 elements keep 32); of a group.
        paged: keep the states in memory that need not be the GPU's: CUDA's managed memory.
        paged_to: of parameters on the CPU: a folder, where the states are a file that is mapped into memory.
        max_grad_norm: scale all gradients so that their common norm is at most this; they are not changed in memory.
            The norm is ``grad_norm`` afterwards, and what ``step`` returns if it got no closure.
        on_nonfinite: what to do if a gradient has NaN or inf: None, nothing; "skip", leave all as it is (and count it
            in ``skipped_steps``); "raise", a FloatingPointError, with nothing changed. A GPU is waited for.
        stochastic_rounding: round bfloat16 parameters up or down at random, so that small updates are not lost.
        seed: of that.
        offload_states: of parameters on a GPU keep the states, and copies of the parameters, in the host's memory,
            where the step runs. Then do not change parameters in place of ``p.data``, which torch does not count.
        offload_gradients: move each gradient there as soon as a backward has made it; needs offload_states. GradScaler
            and DistributedDataParallel do not know such gradients: an error says so.

    Raises:
        ValueError, TypeError: an argument out of range, or no parameter that trains.
        OSError: a folder that cannot be written.
    """

    rule = "adamw"
    bits = 32
    paged = False

    def __init__(
        self,
        params: Iterable,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        *,
        paged_to: str | None = None,
        max_grad_norm: float | None = None,
        on_nonfinite: str | None = None,
        stochastic_rounding: bool = False,
        seed: int = 0,
        offload_states: bool = False,
        offload_gradients: bool = False,
    ):
        if paged_to is not None and not self.paged:
            raise ValueError(
                f"paged_to: expected only for a paged optimizer, got {paged_to!r} for {type(self).__name__}"
            )
        if max_grad_norm is not None and not max_grad_norm > 0:
            raise ValueError(f"max_grad_norm: expected a number above 0, or None, got {max_grad_norm!r}")
        if on_nonfinite is not None:
            check_choice("on_nonfinite", on_nonfinite, ("skip", "raise"))
        self._options = {
            "paged_to": paged_to,
            "max_grad_norm": max_grad_norm,
            "on_nonfinite": on_nonfinite,
            "stochastic_rounding": check_switch("stochastic_rounding", stochastic_rounding),
            "seed": seed,
            "offload_states": check_switch("offload_states", offload_states),
            "offload_gradients": check_switch("offload_gradients", offload_gradients),
        }
        self._forget_memory()
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "bits": self.bits}
        super().__init__(params, defaults | {"rule": self.rule})
        if not any(p.requires_grad for group in self.param_groups for p in group["params"]):
            raise ValueError("params: expected at least one parameter that requires gradients, got none")
        for p in chain.from_iterable(group["params"] for group in self.param_groups):
            if p.device.type != "meta":
                self._arena_of(self._offload.home(p))  # finds a folder or device that cannot be

    def _forget_memory(self) -> None:
        self._offload = Offload(self._options["offload_states"], self._options["offload_gradients"])
        self._arenas: dict[torch.device, Arena] = {}
        self._memory: dict[torch.nn.Parameter, _Memory] = {}
        self._calls: list[Call] = []
        self._stepped: list[torch.nn.Parameter] = []  # of these calls, in the groups' order
        #: The common norm of the gradients of the last step, fp32, where max_grad_norm or on_nonfinite is set.
        self.grad_norm: torch.Tensor | None = None
        #: How many steps were left out because a gradient was not finite.
        self.skipped_steps = 0

    def add_param_group(self, group: dict[str, Any]) -> None:
        """As torch's: settings that the group does not have are the optimizer's.

        Raises:
            ValueError, TypeError: a setting out of range, or a parameter of another dtype; nothing is added.
        """
        check_group({**self.defaults, **group}, self.rule)
        if isinstance(group.get("params"), torch.Tensor):
            group = group | {"params": [group["params"]]}
        group = group | {"params": list(group["params"])}
        for entry in group["params"]:
            parameter = entry[1] if isinstance(entry, tuple) else entry
            if isinstance(parameter, torch.Tensor) and parameter.dtype not in _DTYPES:
                raise TypeError(
                    f"params: expected float32, bfloat16 or float16, got {parameter.dtype}, "
                    f"{list(parameter.shape)}; take out what does not train"
                )
            self._offload.check(parameter)
        super().add_param_group(group)
        self._offload.watch(self.param_groups[-1]["params"])

    @property
    def state_bytes(self) -> int:
        """How much memory the states take."""
        return sum(arena.nbytes for arena in self._arenas.values())

    # ---- the step

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Change the parameters that have gradients.

        Args:
            closure: computes the loss again, with gradients, and returns it.

        Returns:
            What the closure returned. Without one, the norm of the gradients where it was wanted, else None.

        Raises:
            TypeError: a sparse gradient. Nothing has changed then.
            FloatingPointError: a gradient that is not finite, with on_nonfinite="raise". Nothing has changed then.
            MemoryError, OSError: no memory, or no room on the disk, for states that are needed first.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        calls = self._prepared_calls()
        params, grads = self._offload.arrived(
            [call.params for call in calls],
            [local_parts(call) for call in calls],
            [dense_gradients(call) for call in calls],
        )
        grads = list(map(contiguous, grads))
        for call, local in zip(calls, params, strict=True):
            if list(map(torch.Tensor.numel, local)) != call.sizes:
                raise ValueError("params: expected the sizes of the first step, got others: make a new optimizer")
        max_norm, on_nonfinite = self._options["max_grad_norm"], self._options["on_nonfinite"]
        self.grad_norm, scale = None, None
        if calls and (max_norm is not None or on_nonfinite is not None):
            norm = common_norm(calls, grads)
            self.grad_norm = norm.float()
            if on_nonfinite is not None and not math.isfinite(norm):
                if on_nonfinite == "raise":
                    raise FloatingPointError(
                        f"gradients: expected finite numbers, got a norm of {float(norm)}; parameters and states are "
                        "as before (on_nonfinite='skip' leaves such steps out)"
                    )
                self.skipped_steps += 1
                return self.grad_norm if closure is None else loss
            if max_norm is not None:
                scale = (max_norm / (norm + 1e-6)).clamp(max=1.0).float()
        for call, local, of_call in zip(calls, params, grads, strict=True):
            self._run(call, local, of_call, None if scale is None else scale.to(call.device))
        return self.grad_norm if closure is None else loss

    def _run(self, call: Call, local: list[torch.Tensor], grads: list[torch.Tensor], scale: torch.Tensor | None):
        dense = contiguous(local)  # of a parameter that is not, kernels change a copy
        arena = self._arenas[call.device]
        arena.check_process()
        arena.prefetch()
        rows = [self._constants(group, state["step"] + 1) for group, state in call.buckets]
        seed = None
        if self._options["stochastic_rounding"]:
            newest = 1 + max(state["step"] for _, state in call.buckets)
            seed = (self._options["seed"] & 0x7FFFFFFF) << 32 | newest
        optimizer_step(self.rule, dense, grads, arena.segments, call.layout, rows, scale, seed)
        for state in call.states:
            state["step"] += 1
        if dense is not local:
            torch._foreach_copy_(local, dense)
        self._offload.send_back(call.params)

    def _constants(self, group: dict[str, Any], step: int) -> Constants:
        lr, eps, weight_decay = (float(group[name]) for name in ("lr", "eps", "weight_decay"))
        return constants(self.rule, lr, group["betas"], eps, weight_decay, step)

    def _prepared_calls(self) -> list[Call]:
        """One call for each device; made anew where other parameters than last time have gradients."""
        now = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        is_known = len(now) == len(self._stepped) and all(map(is_, now, self._stepped))
        if is_known and all(self._offload.home(call.params[0]) == call.device for call in self._calls):
            return self._calls
        self._calls, self._stepped = [], []
        self._offload.watch(now)
        group_of = {p: group for group in self.param_groups for p in group["params"]}
        self._ensure_states({p: group_of[p] for p in now})
        by_device = defaultdict(list)
        for p in now:
            by_device[self._offload.home(p)].append((group_of[p], p))
        self._calls = [self._new_call(device, members) for device, members in by_device.items()]
        self._stepped = now
        return self._calls

    def _new_call(self, device: torch.device, members: list[tuple[dict[str, Any], torch.nn.Parameter]]) -> Call:
        buckets: dict[tuple[int, int], int] = {}
        found, rows = [], []
        for group, p in members:
            key = (id(group), self.state[p]["step"])
            if key not in buckets:
                buckets[key] = len(buckets)
                found.append((group, self.state[p]))
            memory = self._memory[p]
            rows.append([buckets[key], *memory.states.row(memory.place, self.rule)])
        params = [p for _, p in members]
        sizes = [self._memory[p].states.numel for p in params]
        layout = torch.tensor(rows, dtype=torch.int64)
        is_sharded = any(isinstance(p, DTensor) for p in params)
        return Call(device, params, sizes, is_sharded, [self.state[p] for p in params], layout, found)

    # ---- the states

    def _arena_of(self, device: torch.device) -> Arena:
        if device not in self._arenas:
            self._arenas[device] = Arena(device, paged=self.paged, folder=self._options["paged_to"])
        return self._arenas[device]

    def _ensure_states(self, wanted: dict[torch.nn.Parameter, dict[str, Any]]) -> None:
        """Memory for the states of these parameters, of the groups given, that have none on their device yet.

        What ``optimizer.state`` has of them already, after unpickling, goes there.
        """
        new = {}
        for p, group in wanted.items():
            if not self._has_memory(p):
                new[p] = StatesOf(p, self.rule, group["bits"], self._offload.home(p))
                if self.state.get(p):
                    new[p].check(self.state[p], p, f"state of a parameter {list(p.shape)}")
        for p, place in self._places_for(new).items():
            self._give_back([p])
            self._put(p, _Memory(new[p], place), self.state.get(p) or {"step": 0})

    def _put(self, p: torch.nn.Parameter, memory: _Memory, values: dict[str, Any]) -> None:
        """Make this memory that of a parameter's states, and write these values of them there."""
        views = memory.states.views(self._arenas[memory.states.device].view(memory.place), p)
        for name in views.keys() & values.keys():
            copy_state(views[name], values[name])
        self._memory[p] = memory
        self.state[p] = {"step": int(values["step"]), **views}

    def _has_memory(self, p: torch.nn.Parameter) -> bool:
        return p in self._memory and self._memory[p].states.device == self._offload.home(p)

    def _places_for(self, new: dict[torch.nn.Parameter, StatesOf]) -> dict[torch.nn.Parameter, tuple[int, int]]:
        """Regions for the states of these parameters: for all of them, or an error and for none."""
        by_device = defaultdict(list)
        for p in new:
            by_device[self._offload.home(p)].append(p)
        places: dict[torch.nn.Parameter, tuple[int, int]] = {}
        try:
            for device, members in by_device.items():
                # An empty shard gets a region too.
                found = self._arena_of(device).take([max(new[p].nbytes, 1) for p in members])
                places.update(zip(members, found, strict=True))
        except BaseException:
            for p, place in places.items():
                self._arenas[self._offload.home(p)].give_back([place])
            raise
        return places

    def _give_back(self, params: Iterable[torch.nn.Parameter]) -> None:
        for p in params:
            if (memory := self._memory.pop(p, None)) is not None:
                self._arenas[memory.states.device].give_back([memory.place])

    # ---- files

    def save(self, path: str | os.PathLike) -> None:
        """Write :meth:`state_dict` to a file. A failed or killed save leaves the old file whole.

        Raises:
            OSError: the file cannot be written.
        """
        with replaced(path) as file:
            torch.save(self.state_dict(), file)

    def load(self, path: str | os.PathLike) -> None:
        """Take over what :meth:`save` wrote; the states are read piece by piece.

        Raises:
            OSError, ValueError: the file cannot be read, or is one of another optimizer. Nothing has changed then.
        """
        try:
            state_dict = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        except (RuntimeError, pickle.UnpicklingError, EOFError) as error:
            raise ValueError(f"{os.fspath(path)}: expected a file that an optimizer saved: {error}") from error
        if not isinstance(state_dict, dict) or not state_dict.keys() >= {"state", "param_groups"}:
            raise ValueError(f"{os.fspath(path)}: expected the state of an optimizer, got {type(state_dict).__name__}")
        self.load_state_dict(state_dict)

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what :meth:`state_dict` returned, also what torch's AdamW did for states of 32 bits.

        Settings of the groups become the file's, as with torch's optimizers.

        Raises:
            ValueError: groups, states or shapes of another optimizer. Nothing has changed then.
        """
        state_dict = dict(state_dict)
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            changed = hook(self, state_dict)
            state_dict = state_dict if changed is None else changed
        groups = self._loaded_groups(state_dict["param_groups"])
        ids = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        group_of = {p: group for group in groups for p in group["params"]}
        loaded = {
            p: state_dict["state"][key] for key, p in zip(ids, group_of, strict=True) if key in state_dict["state"]
        }
        new = {}
        for number, (p, group) in enumerate(group_of.items()):
            if p in loaded:
                states = StatesOf(p, self.rule, group["bits"], self._offload.home(p))
                states.check(loaded[p], p, f"state_dict, parameter {number} {list(p.shape)}")
                new[p] = states
        places = self._places_for({p: states for p, states in new.items() if not self._has_memory(p)})
        self._give_back([p for p in self._memory if p not in loaded or p in places])
        self._calls, self._stepped, self.param_groups = [], [], groups
        self.state = defaultdict(dict)
        for p, states in new.items():
            place = places[p] if p in places else self._memory[p].place
            self._put(p, _Memory(states, place), loaded[p])
        for hook in self._optimizer_load_state_dict_post_hooks.values():
            hook(self)

    def _loaded_groups(self, saved: list[dict[str, Any]]) -> list[dict[str, Any]]:
        ours, theirs = ([len(group["params"]) for group in groups] for groups in (self.param_groups, saved))
        if ours != theirs:
            raise ValueError(f"state_dict: expected groups of {ours} parameters, got {theirs}")
        groups = []
        for group, other in zip(self.param_groups, saved, strict=True):
            merged = group | {name: value for name, value in other.items() if name != "params"}
            for name in ("rule", "bits"):
                if merged[name] != group[name]:
                    raise ValueError(
                        f"state_dict: expected {name}={group[name]!r}, got {merged[name]!r}: of another optimizer"
                    )
            if other.get("amsgrad") or other.get("maximize") or not other.get("decoupled_weight_decay", True):
                raise ValueError("state_dict: expected one of AdamW without amsgrad and maximize: of another optimizer")
            check_group(merged, self.rule)
            groups.append(merged)
        return groups

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_options": self._options}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # Of another process, or a copy: the states get memory of their own at the next step.
        super().__setstate__(state)
        self._forget_memory()
        self._offload.watch([p for group in self.param_groups for p in group["params"]])

"""lowbit/ops/shared_input.py: in a CUDA graph products with the same x share a launch; nobody can tell by the numbers.

Here the ops are those made of other ops, on a CPU; tests/test_cuda_bindings_lora.py has the kernels and the launches.
"""

import contextlib
import copy
import gc
import threading
import weakref

import pytest
import torch
from cases import make_weight
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import lowbit
from lowbit.backends import NAMESPACES
from lowbit.ops import linear as products
from lowbit.ops import shared_input
from lowbit_lora import LoraConfig, LoraModel

N, K, RANK = 32, 64, 4
Q = lowbit.quantize(make_weight((N, K)))


class Place:
    """The stream and the graph in which products are called: None outside of a graph."""

    now: tuple[int, int] | None = (1, 1)


@pytest.fixture(autouse=True)
def captured(monkeypatch):
    """As on a GPU, a product and its LoRA are one op; a graph is being captured; and nothing has been seen yet."""
    monkeypatch.setattr(Place, "now", (1, 1))
    monkeypatch.setattr(shared_input, "_capture", lambda x: Place.now)
    monkeypatch.setattr(products, "HAVE_LORA_KERNELS", {(name, "cpu") for name in NAMESPACES.values()})
    monkeypatch.setattr(shared_input, "_thread", shared_input._Thread())


class Called(TorchDispatchMode):
    """Context that lists the ops of lowbit that are called."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if lowbit.QuantizedTensor in types:
            return NotImplemented
        if op.namespace.startswith("lowbit"):
            self.names.append(op._opname)
        return op(*args, **(kwargs or {}))


@contextlib.contextmanager
def nothing_shared():
    """Context in which each product computes its own t: what all the others have to equal."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shared_input, "find", lambda x, lora_a: (None, ()))
        yield


def factors(count, seed=0):
    """``count`` pairs (lora_a, lora_b), as a model has them."""
    generator = torch.Generator().manual_seed(seed)

    def parameter(*shape):
        return nn.Parameter(torch.randn(shape, generator=generator))

    return [(parameter(RANK, K), parameter(N, RANK)) for _ in range(count)]


def new_x(rows=3, seed=0):
    return torch.randn(rows, K, generator=torch.Generator().manual_seed(seed))


def product(x, pair):
    return lowbit.lora_linear(x, Q, *pair, 0.5)


def assert_alone(y, x, pair):
    """Bit for bit what the product computes by itself."""
    with nothing_shared():
        assert torch.equal(y, product(x, pair))


def ops_of(x, pairs):
    """The ops that products of x with each of the pairs call, whose results are right."""
    with Called() as called:
        ys = [product(x, pair) for pair in pairs]
    for y, pair in zip(ys, pairs, strict=True):
        assert_alone(y, x, pair)
    return called.names


ALONE = ["lora_linear"] * 3
SHARED = ["lora_linear_shared", "linear", "linear"]


def test_the_second_x_is_shared():
    """Were who follows whom not seen, q, k and v would launch 6 kernels in place of 4 for each token."""
    pairs = factors(3)
    assert [ops_of(new_x(), pairs) for _ in range(3)] == [ALONE, SHARED, SHARED]


def test_a_run_before_the_capture(monkeypatch):
    """The run that torch asks for before a capture shows who follows whom: the one that is captured shares. Runs
    outside of graphs launch nothing for others, which would cost the host more than it saves.
    """
    pairs = factors(3)
    monkeypatch.setattr(Place, "now", None)
    assert [ops_of(new_x(), pairs) for _ in range(2)] == [ALONE, ALONE]
    monkeypatch.setattr(Place, "now", (1, 1))
    assert ops_of(new_x(), pairs) == SHARED


CHANGES = (
    "x",
    "A",
    "x.data",
    "A.data",
    "new x",
    "shorter A",
    "new A",
    "no_grad",
    "inference",
    "eager",
    "graph",
    "stream",
)
CHANGES += ("skip", "twice")
#: Which of two x the layers take one after the other, and what happens before which of them.
STEPS = st.tuples(st.integers(0, 1), st.dictionaries(st.integers(0, 2), st.sampled_from(CHANGES), max_size=2))


@given(st.lists(STEPS, min_size=2, max_size=6))
@settings(max_examples=200, deadline=None)
def test_any_change_between_products(steps):
    """A t of an x or an A that has changed since, or of another one at the same address, would be a wrong activation
    that nothing reports.
    """
    shared_input._thread, Place.now = shared_input._Thread(), (1, 1)
    pairs, xs = factors(3), [new_x(seed=seed) for seed in (1, 2)]
    for j, changes in steps:
        for i in range(3):
            change = changes.get(i)
            apply_change(change, pairs, i, xs, j)
            with MODES.get(change, contextlib.nullcontext)():
                for _ in range({"skip": 0, "twice": 2}.get(change, 1)):
                    y = product(xs[j], pairs[i])
                    assert_alone(y, xs[j], pairs[i])


MODES = {"no_grad": torch.no_grad, "inference": torch.inference_mode}


def apply_change(change, pairs, i, xs, j):
    """Change layer i, the x of number j, or where products are called."""
    lora_a, x = pairs[i][0], xs[j]
    if change in ("eager", "graph", "stream"):
        Place.now = {"eager": None, "graph": (1, 2 + i), "stream": (2 + i, 1)}[change]
    elif change == "x":
        x.add_(1)
    elif change == "x.data":
        x.data = x + 1
    elif change == "new x":
        del x
        xs[j] = None  # its memory and its id are free for the next
        xs[j] = new_x(seed=i)
    elif change == "A":
        with torch.no_grad():
            lora_a.mul_(2)
    elif change == "A.data":  # as Module.to does
        lora_a.data = lora_a.data + 1
    elif change == "shorter A":
        for each, size in zip(pairs[i], ((2, K), (N, 2)), strict=True):
            each.data = each.data[: size[0], : size[1]]
    elif change == "new A":
        pairs[i] = factors(1, seed=i)[0]


def test_gradients():
    """Each layer's factors get their own gradients, and x those of all."""
    pairs, grads = factors(3), []
    leaves = [each for pair in pairs for each in pair]
    for rounds in range(2):
        with nothing_shared() if not rounds else contextlib.nullcontext():
            for _ in range(2):
                x = new_x().requires_grad_()
                total = sum((i + 1) * product(x, pair).square().sum() for i, pair in enumerate(pairs))
            grads.append(torch.autograd.grad(total, [x, *leaves]))
    for ours, alone in zip(*grads, strict=True):
        assert torch.equal(ours, alone)


def test_nothing_is_kept():
    """A t or an x that stays behind is memory that no user can free; activations of each layer would add up."""
    pairs = factors(3)
    ops_of(new_x(), pairs)
    x = new_x()
    for pair in pairs:
        product(x, pair)
    assert all(each.t is None for each in shared_input._thread.latest.followers)
    known = weakref.ref(x)
    del x
    assert known() is None
    x = new_x()
    product(x, pairs[0])  # two others do not come
    waiting = [weakref.ref(each.t) for each in shared_input._thread.latest.followers]
    assert len(waiting) == 2 and all(each() is not None for each in waiting)
    del x
    assert all(each() is None for each in waiting)
    del pairs, pair
    gc.collect()
    assert not shared_input._thread.met


def test_who_does_not_come_is_forgotten():
    """A layer that is skipped from now on would cost a product each time."""
    pairs = factors(3)
    ops_of(new_x(), pairs)
    assert ops_of(new_x(), pairs[:2]) == SHARED[:2]
    x = new_x()
    product(x, pairs[0])
    (follower,) = shared_input._thread.latest.followers
    assert follower.lora_a() is pairs[1][0] and follower.t is not None


def test_more_than_one_launch_serves():
    """Layers that run side by side on one x may be more than the kernel takes."""
    pairs = factors(shared_input.MOST + 3)
    ops_of(new_x(), pairs)
    names = ops_of(new_x(), pairs)
    assert names == ["lora_linear_shared", *["linear"] * shared_input.MOST, *["lora_linear"] * 2]


def test_factors_of_another_kind():
    """rank_pattern gives one layer of three another rank, and a dtype may be another: these have their own launches."""
    first, longer, narrow = factors(3)
    longer = [nn.Parameter(torch.randn(2 * RANK, K)), nn.Parameter(torch.randn(N, 2 * RANK))]
    narrow = [nn.Parameter(each.detach().bfloat16()) for each in narrow]
    for _ in range(2):
        assert ops_of(new_x(), [first, longer, narrow]) == ALONE


def test_a_factor_that_becomes_one_of_another_kind():
    """A launch for factors of two ranks or dtypes would be an error in q, because of what somebody did to k."""
    pairs = factors(3)
    ops_of(new_x(), pairs)
    lora_a = pairs[1][0]
    lora_a.data = lora_a.data.half()
    x = new_x()
    _, others = shared_input.find(x, pairs[0][0])
    assert [id(each) for each in others] == [id(pairs[2][0])]


@pytest.mark.parametrize("place", [(2, 1), (1, 2), None])
def test_another_stream_or_graph(place):
    """Kernels of another stream do not wait for the launch that computes t: they would read what is not there yet. The
    replay of another graph, or a call outside of any, would read what the first graph's last replay left.
    """
    pairs = factors(2)
    ops_of(new_x(), pairs)
    x = new_x()
    product(x, pairs[0])
    Place.now = place
    with Called() as called:
        product(x, pairs[1])
    assert called.names == ["lora_linear"]


def test_another_thread():
    """A server's threads run one model on their own inputs; here on the same x, which is the hardest case."""
    pairs = factors(3)
    ops_of(new_x(), pairs)
    x, seen = new_x(), []
    product(x, pairs[0])

    def other():
        with Called() as called:
            seen.extend(product(x, pair) for pair in pairs[1:])
        seen.append(called.names)

    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    assert seen.pop() == ALONE[:2]
    for y, pair in zip(seen, pairs[1:], strict=True):
        assert_alone(y, x, pair)


def test_factors_that_are_no_parameters():
    """The weights of DataParallel's replicas, shards and parametrized weights are others at each call."""
    pairs = [[each.detach() for each in pair] for pair in factors(3)]
    for _ in range(2):
        assert ops_of(new_x(), pairs) == ALONE


class Attention(nn.Module):
    """What an attention does with x, as far as it matters here."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(self, name, nn.Linear(K, K))

    def forward(self, x):
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        return self.o_proj(torch.softmax(q @ k.mT, -1) @ v)


def attention(**options) -> LoraModel:
    model = Attention()
    lowbit.quantize_(model)
    model = LoraModel(model, LoraConfig(rank=RANK, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"], **options))
    randomize(model)
    return model


def randomize(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))


def results(model, run=lambda model, x: model(x)):
    """(y, the gradients) of the second of two steps, and the ops of its forward."""
    for _ in range(2):
        x = new_x(5).requires_grad_()
        torch.manual_seed(0)
        with Called() as called:
            y = run(model, x)
    leaves = [x, *(each for each in model.parameters() if each.requires_grad)]
    y.float().square().sum().backward()  # not autograd.grad, which reentrant checkpoints refuse
    grads = [each.grad for each in leaves]
    model.zero_grad()
    return [y.detach(), *grads], called.names


def assert_same_model(model, run=lambda model, x: model(x), shares=True):
    """That sharing changes no number of a step, and whether there is any."""
    ours, names = results(model, run)
    with nothing_shared():
        alone, _ = results(model, run)
    assert ("lora_linear_shared" in names) == shares
    for our, their in zip(ours, alone, strict=True):
        assert (our is None and their is None) or torch.equal(our, their)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant):
    """A recomputation that shares otherwise than the forward did must save the same tensors for the backward."""
    assert_same_model(attention(), lambda model, x: checkpoint(model, x, use_reentrant=reentrant))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast(dtype):
    """Under autocast an x in fp32 is cast for each layer: there is no tensor that they share, and one in bf16 is it."""

    def run(model, x):
        with torch.autocast("cpu", torch.bfloat16):
            return model(x.to(dtype))

    assert_same_model(attention(), run, shares=dtype == torch.bfloat16)


def test_compiled():
    """torch.compile sees one op for each layer, whatever eager calls have shared before."""
    torch._dynamo.reset()
    model = attention()
    results(model)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    x = new_x(5)
    assert torch.equal(compiled(x), model(x))


def test_ddp():
    """DistributedDataParallel reduces each gradient once it is there, and in the next step's forward A is another."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        assert_same_model(nn.parallel.DistributedDataParallel(attention()))
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("where", ["q_proj", "k_proj", "v_proj"])
@pytest.mark.parametrize("what", ["other x", "x in place", "A in place"])
def test_hooks(where, what):
    """A user's hook on one of the layers changes what it, and what comes after it, computes with."""
    model = attention()
    layer = model.get_submodule(next(name for name, _ in model.named_modules() if name.endswith(where)))

    def hook(module, args):
        if what == "other x":
            return (args[0] * 2,)
        with torch.no_grad():
            (args[0] if what == "x in place" else module.lora_A["default"].weight).mul_(2)
        return None

    layer.register_forward_pre_hook(hook)
    x = new_x(5)
    model(x)
    state = copy.deepcopy(model.state_dict())
    given = x.clone()
    y = model(x)
    model.load_state_dict(state)
    with nothing_shared():
        assert torch.equal(y, model(given))


def test_adapters_that_change():
    """Several active adapters, none, merged ones and one for each row of a batch, each after q, k and v have shared."""
    model = attention()
    model.add_adapter("other", LoraConfig(rank=2, target_modules=["q_proj", "v_proj"]))
    randomize(model)
    assert_same_model(model)
    model.set_adapter(["default", "other"])
    assert_same_model(model, shares=False)  # q and v have both, side by side: another matrix at each call
    model.set_adapter("other")
    assert_same_model(model)  # q and v
    model.set_adapter("default")
    key = model.get_submodule("model.k_proj")
    key.merge()
    assert_same_model(model)
    key.unmerge()
    with model.disable_adapter():
        x = new_x(5)
        with nothing_shared():
            expected = model(x)
        assert torch.equal(model(x), expected)
    assert_same_model(model)
    names = ["default", "other", "__base__", "other", "other"]
    assert_same_model(model, lambda model, x: model(x, adapter_names=names), shares=False)


def test_a_copy_of_a_model():
    """A copy, and a pickled one, have their own factors: those of the original must not appear in their outputs."""
    model = attention()
    results(model)
    copied = copy.deepcopy(model)
    randomize(copied, seed=1)
    for _ in range(2):
        x = new_x(5)
        y, ours = model(x), copied(x)
        with nothing_shared():
            assert torch.equal(model(x), y) and torch.equal(copied(x), ours)
        assert not torch.equal(y, ours)


def test_an_optimizer_step_between():
    """The factors of the next step are others."""
    model, losses = attention(), []
    for shared in (False, True):
        ours = copy.deepcopy(model)
        optimizer = torch.optim.AdamW([each for each in ours.parameters() if each.requires_grad], lr=0.01)
        with contextlib.nullcontext() if shared else nothing_shared():
            for _ in range(4):
                loss = ours(new_x(5)).square().mean()
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
        losses.append(loss)
    assert torch.equal(*losses)

"""Optimizers whose states and gradients are on the host: same bits, copies in the right order, errors where due.

There is no GPU here: tests/conftest_transfer.py takes the CPU's memory for one's, and is strict about the order.
"""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from conftest_models import IDS, llama
from conftest_transfer import LateTransfer
from torch import nn

from lowbit_lora import LoraConfig, LoraModel
from lowbit_lora.optim import AdamW, AdamW8bit, Lion, PagedAdamW8bit, get_paged_optimizer, optimizer_cls_and_kwargs
from lowbit_lora.optim import offload as offload_module
from lowbit_lora.optim.offload import HostGradient

STATES, GRADIENTS = {"offload_states": True}, {"offload_states": True, "offload_gradients": True}
offloads = pytest.mark.parametrize("offload", [STATES, GRADIENTS], ids=["states", "gradients"])
SHAPES = [((), torch.float32), ((0,), torch.float32), ((5, 7), torch.float32), ((3, 1401), torch.float32)]
SHAPES += [((300,), torch.bfloat16), ((65, 64), torch.float16)]


@pytest.fixture
def late_transfer(monkeypatch):
    """All transfers that optimizers make in the test; they are LateTransfers."""
    made = []

    def make():
        made.append(LateTransfer())
        return made[-1]

    monkeypatch.setattr(offload_module, "Transfer", make)
    return made


class Bag(nn.Module):
    """Parameters of all kinds: one is transposed in memory, one is frozen, one gets a gradient now and then."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        made = [nn.Parameter(torch.randn(shape).to(dtype)) for shape, dtype in SHAPES]
        made.append(nn.Parameter(torch.randn(70, 60).t()))
        self.frozen = nn.Parameter(torch.randn(4), requires_grad=False)
        self.often, self.seldom = nn.ParameterList(made), nn.Parameter(torch.randn(9))

    def loss(self, seed: int, factor: float = 1.0) -> torch.Tensor:
        """A number with gradients that depend on the seed, and for odd seeds on ``seldom`` too."""
        generator = torch.Generator().manual_seed(seed)
        params = [*self.often, self.seldom] if seed % 2 else list(self.often)
        return sum((torch.randn(p.shape, generator=generator) * (p.float() + 1) * factor).sum() for p in params)


def three_steps(bag, optimizer):
    for seed in range(3):
        bag.loss(seed).backward()
        optimizer.step()
        optimizer.zero_grad()


def zeroed_in_place(bag, optimizer):
    for seed in (1, 2, 4):  # of the last two `seldom` has zeros as its gradient
        bag.loss(seed).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
    bag.zero_grad(set_to_none=False)
    optimizer.step()


def accumulated(bag, optimizer):
    for seed in range(6):
        bag.loss(seed).backward()
        if seed % 3 == 2:
            optimizer.step()
            optimizer.zero_grad()


def never_zeroed(bag, optimizer):
    for seed in range(3):
        bag.loss(seed).backward()
        optimizer.step()
        optimizer.step()


def zeroed_by_the_module(bag, optimizer):
    """As transformers' Trainer does, and once before the step, which drops gradients."""
    bag.loss(7).backward()
    bag.zero_grad()
    for seed in (1, 2):
        bag.loss(seed).backward()
        optimizer.step()
        bag.zero_grad()


def dropped_by_hand(bag, optimizer):
    bag.loss(1).backward()
    bag.often[2].grad = None
    bag.often[3].grad = torch.ones(SHAPES[3][0])
    bag.loss(2).backward()
    optimizer.step()


def clipped(bag, optimizer):
    norms = []
    for seed, factor in ((0, 0.001), (1, 5.0), (2, 1.0)):
        bag.loss(seed, factor).backward()
        norms.append(optimizer.step())
        optimizer.zero_grad()
    return norms


def clipped_by_torch(bag, optimizer):
    norms = []
    for seed in (1, 2):
        bag.loss(seed).backward()
        bag.loss(seed + 2).backward()
        norms.append(nn.utils.clip_grad_norm_(bag.parameters(), 3.0, foreach=False))
        optimizer.step()
        bag.zero_grad()
    return norms


def not_finite(bag, optimizer):
    norms = []
    for seed, factor in ((0, 1.0), (1, float("nan")), (2, float("inf")), (3, 1.0)):
        bag.loss(seed, factor).backward()
        try:
            norms.append(optimizer.step())
        except FloatingPointError as error:
            norms.append(str(error))
        optimizer.zero_grad()
    return norms, optimizer.skipped_steps


def by_closure(bag, optimizer):
    def closure():
        optimizer.zero_grad()
        loss = bag.loss(1)
        loss.backward()
        return loss

    return [optimizer.step(closure).detach() for _ in range(3)]


def changed_between(bag, optimizer):
    three_steps(bag, optimizer)
    with torch.no_grad():
        bag.often[2].mul_(3)
        bag.often[4].zero_()
    bag.often[3].data = bag.often[3].data * 2
    three_steps(bag, optimizer)


def group_added(bag, optimizer):
    three_steps(bag, optimizer)
    bag.more = nn.Parameter(torch.ones(33))
    optimizer.add_param_group({"params": [bag.more], "lr": 0.3})
    bag.seldom = bag.more
    three_steps(bag, optimizer)


def thawed(bag, optimizer):
    optimizer.add_param_group({"params": bag.frozen})
    three_steps(bag, optimizer)
    bag.frozen.requires_grad_(True)
    for seed in range(4):
        (bag.loss(seed) + (bag.frozen * seed).sum()).backward()
        optimizer.step()
        optimizer.zero_grad()


def loaded(bag, optimizer):
    three_steps(bag, optimizer)
    saved = copy.deepcopy(optimizer.state_dict())
    three_steps(bag, optimizer)
    optimizer.load_state_dict(saved)
    three_steps(bag, optimizer)


def unpickled(bag, optimizer):
    three_steps(bag, optimizer)
    other, mine = pickle.loads(pickle.dumps((bag, optimizer)))
    three_steps(other, mine)
    return [p.detach() for p in other.parameters()], [*mine.state_dict()["state"].values()]


def looked_at_between(bag, optimizer):
    bag.loss(1).backward()
    torch.autograd.grad(bag.loss(3), [*bag.often])
    bag.loss(2).backward()
    optimizer.step()


RUNS = [three_steps, zeroed_in_place, accumulated, never_zeroed, zeroed_by_the_module, dropped_by_hand, by_closure]
RUNS += [clipped_by_torch, changed_between, group_added, thawed, loaded, unpickled, looked_at_between]
KINDS = {
    "AdamW": (AdamW, {}),
    "AdamW8bit": (AdamW8bit, {"lr": 0.01, "stochastic_rounding": True, "seed": 5}),
    "PagedAdamW8bit": (PagedAdamW8bit, {"max_grad_norm": 0.5}),
    "Lion": (Lion, {"max_grad_norm": 2.0, "on_nonfinite": "skip"}),
}


def bits(value):
    """A value, and tensors in it as their bytes."""
    if isinstance(value, torch.Tensor):
        return value.dtype, value.shape, value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    if isinstance(value, dict):
        return {key: bits(entry) for key, entry in value.items()}
    return [bits(entry) for entry in value] if isinstance(value, (list, tuple)) else value


def outcome(run, kind, options):
    """All that can be seen of a training: what it returned, parameters and states."""
    bag = Bag()
    optimizer = kind([{"params": list(bag.often)}, {"params": [bag.seldom], "lr": 0.02}], **options)
    returned = run(bag, optimizer)
    return bits([returned, [*bag.parameters()], optimizer.state_dict(), optimizer.grad_norm])


@offloads
@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.__name__)
@pytest.mark.parametrize("kind", KINDS)
def test_same_bits(late_transfer, kind, run, offload):
    """Moving states to the host would change what is trained, or what a file of it holds."""
    made, options = KINDS[kind]
    assert outcome(run, made, options | offload) == outcome(run, made, options)
    assert "to device" in late_transfer[0].log


@offloads
@pytest.mark.parametrize("on_nonfinite", ["skip", "raise"])
def test_same_bits_of_what_is_checked(late_transfer, on_nonfinite, offload):
    """Gradients on the host would escape clipping, or one that is not finite would spoil the parameters."""
    for run, options in ((clipped, {"max_grad_norm": 1.0}), (not_finite, {"on_nonfinite": on_nonfinite})):
        assert outcome(run, AdamW, options | offload) == outcome(run, AdamW, options)


@offloads
def test_some_parameters_on_the_host(late_transfer, monkeypatch, offload):
    """A model of which a part is on the CPU already could not be trained by one optimizer."""
    monkeypatch.setattr(LateTransfer, "is_near", staticmethod(lambda tensor: tensor.dim() == 1))
    assert outcome(accumulated, AdamW, offload) == outcome(accumulated, AdamW, {})
    bag = Bag()
    optimizer = AdamW(bag.parameters(), **GRADIENTS)
    bag.loss(1).backward()
    assert not isinstance(bag.seldom.grad, HostGradient) and isinstance(bag.often[2].grad, HostGradient)
    optimizer.step()


@offloads
def test_parameters_of_the_host_change_nothing(offload):
    """A script that is tried on a machine without a GPU would fail, or hold parameters twice."""
    for run in (three_steps, accumulated):
        assert outcome(run, AdamW, offload) == outcome(run, AdamW, {})
    bag = Bag()
    optimizer = get_paged_optimizer(bag, **offload)
    bag.loss(0).backward()
    optimizer.step()
    assert type(bag.often[2].grad) is torch.Tensor and not optimizer._offload._copies


class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return len(IDS)

    def __getitem__(self, i):
        return {"input_ids": IDS[i], "labels": IDS[i]}


def test_transformers_trainer(late_transfer, tmp_path):
    """Trainer clips by torch and lets the model zero gradients: they would be unclipped, or grow from step to step."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    options = {"max_steps": 3, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "use_cpu": True}
    options |= {"max_grad_norm": 0.3, "report_to": [], "save_strategy": "no", "disable_tqdm": True}
    options |= {"remove_unused_columns": False, "seed": 0}
    found = []
    for offload in ({}, GRADIENTS):
        torch.manual_seed(0)
        model = LoraModel(llama(), LoraConfig(rank=4))
        made = optimizer_cls_and_kwargs(model, lr=1e-2, **offload)
        arguments = transformers.TrainingArguments(str(tmp_path), **options)
        transformers.Trainer(model, arguments, train_dataset=Rows(), optimizer_cls_and_kwargs=made).train()
        found.append(bits([p for p in model.parameters() if p.requires_grad]))
    assert found[0] == found[1]
    assert "to device" in late_transfer[-1].log


def test_states_in_a_file(late_transfer, tmp_path):
    """States that do not fit the host's memory either could not be paged to a disk."""
    bag = Bag()
    optimizer = get_paged_optimizer(bag, paged_to=str(tmp_path), **GRADIENTS)
    bag.loss(1).backward()
    optimizer.step()
    assert optimizer.state_bytes > 0
    assert {state["exp_avg"].device.type for state in optimizer.state.values()} == {"cpu"}


@offloads
def test_number_of_copies(late_transfer, offload):
    """Each step would send all parameters to the host again, or wait for the GPU once for each of them."""
    bag = Bag()
    params = bag.often[2:]  # without the empty one
    optimizer = AdamW(params, **offload)
    log, count = late_transfer[0].log, len(params)
    wanted = {"to host": 2 * count, "synchronize": 1, "to device": count, "join": 1}
    for changed in (0, 0, 1):
        with torch.no_grad():
            for p in params[:changed]:
                p.add_(1)
        bag.loss(0).backward()
        assert len(log) == (count if "offload_gradients" in offload else 0)
        optimizer.step()
        assert log[-count - 1 :] == ["to device"] * count + ["join"]
        if changed:
            wanted["to host"] += changed
        assert {name: log.count(name) for name in wanted} == wanted
        log.clear()
        wanted["to host"] = count  # parameters are on the host from now on
        optimizer.zero_grad()


def test_gradients_leave_the_device(late_transfer):
    """The memory of gradients would not be freed, for which they are moved."""
    p = nn.Parameter(torch.randn(64))
    optimizer = AdamW([p], **GRADIENTS)
    dense, copy_late = [], late_transfer[0].copy

    def noted(to, source):
        dense.append(weakref.ref(source))
        return copy_late(to, source)

    late_transfer[0].copy = noted
    for _ in range(2):
        (p * 2).sum().backward()
    late_transfer[0].synchronize()
    gc.collect()
    assert len(dense) == 2 and all(reference() is None for reference in dense)
    assert isinstance(p.grad, HostGradient)
    assert torch.equal(p.grad.total.value(), torch.full((64,), 4.0))
    optimizer.zero_grad()
    assert p.grad is None


def with_scaler(optimizer):
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(torch.ones(()))
    scaler.step(optimizer)


@pytest.mark.parametrize(
    "use",
    [
        lambda p, optimizer: nn.utils.clip_grad_value_([p], 1.0),
        lambda p, optimizer: with_scaler(optimizer),
        lambda p, optimizer: torch.optim.SGD([p], 0.1).step(),
        lambda p, optimizer: p.grad.sum(),
        lambda p, optimizer: torch.ones(8).add_(p.grad),
        lambda p, optimizer: p.grad.add_(torch.ones(8), alpha=2),
    ],
    ids=["clip_grad_value_", "GradScaler", "SGD", "sum", "of another", "add_ with alpha"],
)
def test_others_do_not_reach_gradients(late_transfer, use):
    """Clipping or scaling would leave the gradients out in silence, and train with others."""
    p = nn.Parameter(torch.randn(8))
    before, optimizer = p.detach().clone(), AdamW([p], **GRADIENTS)
    (p * 2).sum().backward()
    with pytest.raises(RuntimeError, match="offload_gradients=True.*GradScaler"):
        use(p, optimizer)
    assert torch.equal(p, before) and "HostGradient([8]" in repr(p.grad)


def test_distributed_data_parallel_is_an_error(late_transfer, tmp_path):
    """Each process would train with the gradients of its own rows, and the copies of the model drift apart."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        layer = nn.Linear(4, 4)
        optimizer = AdamW(layer.parameters(), **GRADIENTS)
        model = nn.parallel.DistributedDataParallel(layer)
        with pytest.raises(RuntimeError, match="DistributedDataParallel"):
            model(torch.ones(2, 4)).sum().backward()
            optimizer.step()
    finally:
        torch.distributed.destroy_process_group()


def test_sparse_gradients_are_an_error(late_transfer):
    """The error for a sparse embedding would come from inside of a backward, or be none."""
    layer = nn.Embedding(10, 4, sparse=True)
    optimizer = AdamW(layer.parameters(), **GRADIENTS)
    layer(torch.tensor([1])).sum().backward()
    with pytest.raises(TypeError, match="sparse=False"):
        optimizer.step()


def test_an_optimizer_that_is_gone(late_transfer):
    """A model whose optimizer was replaced by another one could not be trained any more."""
    p = nn.Parameter(torch.randn(8))
    optimizer = AdamW([p], **GRADIENTS)
    del optimizer
    gc.collect()
    (p * 2).sum().backward()
    torch.optim.SGD([p], 0.1).step()
    assert type(p.grad) is torch.Tensor


def test_options():
    """A wrong option would be taken for another one, in silence."""
    params = [nn.Parameter(torch.ones(3))]
    with pytest.raises(ValueError, match="offload_gradients: expected offload_states=True"):
        AdamW(params, offload_gradients=True)
    with pytest.raises(TypeError, match="offload_states: expected True or False, got 'yes'"):
        AdamW(params, offload_states="yes")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: torch sees none")
@offloads
def test_on_a_gpu(offload):
    """The copies of a real GPU would be read before they have arrived, or states take its memory."""
    outcomes = []
    for options in (offload, {}):
        torch.manual_seed(0)
        layers = nn.Sequential(*(nn.Linear(1024, 1024) for _ in range(8))).cuda()
        on_host = copy.deepcopy(layers).cpu()  # the same parameters and gradients, stepped on the host
        optimizer = AdamW((layers if options else on_host).parameters(), max_grad_norm=1.0, **options)
        for _ in range(4):
            x = torch.randn(64, 1024, device="cuda")
            for half in x.split(32):
                layers(half).square().mean().backward()
            if options:
                optimizer.step()
            else:
                for mine, theirs in zip(on_host.parameters(), layers.parameters(), strict=True):
                    mine.grad = theirs.grad.cpu()
                optimizer.step()
                with torch.no_grad():
                    for mine, theirs in zip(on_host.parameters(), layers.parameters(), strict=True):
                        theirs.copy_(mine)
                on_host.zero_grad()
            layers.zero_grad()
        assert {state["exp_avg"].device.type for state in optimizer.state.values()} == {"cpu"}
        outcomes.append(bits([p.cpu() for p in layers.parameters()]))
    assert outcomes[0] == outcomes[1]

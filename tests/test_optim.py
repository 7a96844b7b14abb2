"""lowbit_lora/optim: torch's optimizer interface over one fused step, with states in 32 and 8 bits."""

import copy
import io
import math
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lowbit import reference_optim
from lowbit_lora.optim import (
    AdamW,
    AdamW8bit,
    Lion,
    Lion8bit,
    PagedAdamW,
    PagedAdamW8bit,
    PagedLion,
    PagedLion8bit,
)

CLASSES = (AdamW, AdamW8bit, PagedAdamW, PagedAdamW8bit, Lion, Lion8bit, PagedLion, PagedLion8bit)
SHAPES = ((64, 80), (7,), (), (100, 50), (0, 3))
by_class = pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)


def parameters(dtype=torch.float32, shapes=SHAPES, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]


def set_gradients(params, seed, size=1.0):
    generator = torch.Generator().manual_seed(seed)
    for p in params:
        p.grad = (torch.randn(p.shape, generator=generator) * size).to(p.dtype)


def train(optimizer, params, steps, size=1.0):
    for step in steps:
        set_gradients(params, step, size)
        optimizer.step()


def params_of(optimizer):
    return [p for group in optimizer.param_groups for p in group["params"]]


def snapshot(optimizer):
    """A copy of everything that a step may change."""
    states = [optimizer.state[p] for p in params_of(optimizer)]
    states = [{name: torch.as_tensor(value).clone() for name, value in state.items()} for state in states]
    return [p.detach().clone() for p in params_of(optimizer)], states


def assert_same(ours, theirs):
    for our, their in zip(ours[0], theirs[0], strict=True):
        assert torch.equal(our, their)
    for our, their in zip(ours[1], theirs[1], strict=True):
        assert our.keys() == their.keys()
        assert all(torch.equal(our[name], their[name]) for name in our)


@settings(max_examples=25, deadline=None)
@given(
    lr=st.sampled_from((1e-4, 1e-2, 1.0)),
    betas=st.sampled_from(((0.9, 0.999), (0.0, 0.0), (0.5, 0.99))),
    weight_decay=st.sampled_from((0.0, 0.1)),
    size=st.sampled_from((1e-6, 1.0, 1e6)),
)
def test_adamw_is_torchs(lr, betas, weight_decay, size):
    """Another formula than torch's AdamW would need other settings, and train to something else."""
    ours, theirs = parameters(), parameters()
    settings = {"lr": lr, "betas": betas, "weight_decay": weight_decay}
    train(AdamW(ours, **settings), ours, range(4), size)
    # torch's in fp64, so that only our roundings count: of the step's numbers and of the values.
    exact = [nn.Parameter(p.detach().double()) for p in theirs]
    optimizer = torch.optim.AdamW(exact, **settings)
    for step in range(4):
        set_gradients(theirs, step, size)
        for p, q in zip(exact, theirs, strict=True):
            p.grad = q.grad.double()
        optimizer.step()
    for p, q in zip(ours, exact, strict=True):
        # 1 - beta2 in fp32, of 0.001, is off by 2^-24 / 0.001 relative at most: the largest of the errors of a step.
        bound = 4 * (lr * 1e-4 + 2**-22 * (q.abs() + lr))
        assert bool(((p.double() - q).abs() <= bound).all())


def test_lion_is_the_papers():
    """Lion would move by something else than the sign of the interpolated momentum."""
    params = parameters()
    momentum = [torch.zeros(p.shape, dtype=torch.float64) for p in params]
    exact = [p.detach().double() for p in params]
    optimizer = Lion(params, lr=0.01, weight_decay=0.1)
    for step in range(3):
        set_gradients(params, step)
        for i, p in enumerate(params):
            grad = p.grad.double()
            exact[i] = exact[i] * (1 - 0.01 * 0.1) - 0.01 * torch.sign(0.9 * momentum[i] + 0.1 * grad)
            momentum[i] = 0.99 * momentum[i] + 0.01 * grad
        optimizer.step()
    for p, q in zip(params, exact, strict=True):
        assert torch.allclose(p.double(), q, atol=1e-6)


@by_class
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resuming_from_a_file_gives_the_same_bits(cls, dtype, tmp_path):
    """Training that was stopped and resumed would differ from training that went on."""
    folder = {"paged_to": str(tmp_path)} if cls.paged else {}
    options = {"stochastic_rounding": True, "max_grad_norm": 1.0, "seed": 3, **folder}
    params = parameters(dtype)
    optimizer = cls(params, lr=1e-2, weight_decay=0.1, **options)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
    for step in range(3):
        train(optimizer, params, [step])
        schedule.step()
    file = io.BytesIO()
    torch.save({"params": params, "optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}, file)
    for step in range(3, 6):
        train(optimizer, params, [step])
        schedule.step()

    saved = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    resumed = cls(saved["params"], lr=5.0, **options)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(resumed, 10)
    resumed.load_state_dict(saved["optimizer"])
    schedule.load_state_dict(saved["schedule"])
    for step in range(3, 6):
        train(resumed, saved["params"], [step])
        schedule.step()
    assert_same(snapshot(resumed), snapshot(optimizer))


@by_class
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["deepcopy", "pickle"])
def test_copies_go_on_like_the_original(cls, copied):
    """A copy would share the states' memory with the original, or have lost them."""
    params = parameters()
    optimizer = cls(params, lr=1e-2)
    train(optimizer, params, range(2))
    other = copied(optimizer)
    train(optimizer, params, range(2, 5))
    train(other, params_of(other), range(2, 5))
    assert_same(snapshot(other), snapshot(optimizer))


def test_files_of_torchs_adamw_go_both_ways():
    """A run that began with torch's AdamW could not go on here, or the other way."""
    params, theirs = parameters(), parameters()
    ours, torchs = AdamW(params, lr=1e-3), torch.optim.AdamW(theirs, lr=1e-3)
    train(torchs, theirs, range(3))
    ours.load_state_dict(torchs.state_dict())
    for p, q in zip(params, theirs, strict=True):
        assert torch.equal(ours.state[p]["exp_avg"], torchs.state[q]["exp_avg"])
        assert ours.state[p]["step"] == 3
    again = torch.optim.AdamW(parameters(), lr=1e-3)
    again.load_state_dict(ours.state_dict())
    train(again, params_of(again), range(3, 4))
    assert all(int(again.state[p]["step"]) == 4 for p in params_of(again))


def other_files():
    params = parameters()
    for name, optimizer in (
        ("rule", Lion(params)),
        ("bits", AdamW8bit(params)),
        ("states", torch.optim.SGD(params, momentum=0.9)),
        ("states", torch.optim.Adagrad(params)),
        ("amsgrad", torch.optim.AdamW(params, amsgrad=True)),
        ("another optimizer", torch.optim.Adam(params)),
        ("groups", AdamW(params[:2])),
        ("exp_avg", AdamW([nn.Parameter(p.detach().flatten()) for p in params])),
    ):
        train(optimizer, params_of(optimizer), range(1))
        yield name, optimizer.state_dict()
    right = AdamW(params)
    train(right, params, range(1))
    broken = right.state_dict()
    broken["state"][3] = broken["state"][3] | {"step": -1}
    yield "step", broken
    broken = right.state_dict()
    broken["param_groups"][0]["lr"] = -1.0
    yield "lr", broken


@pytest.mark.parametrize(("named", "state_dict"), list(other_files()))
def test_other_files_are_refused_and_change_nothing(named, state_dict):
    """States of another optimizer or of other shapes would be taken for ours, or half of a file be loaded."""
    params = parameters()
    optimizer = AdamW(params, lr=1e-2)
    train(optimizer, params, range(2))
    before, lr = snapshot(optimizer), optimizer.param_groups[0]["lr"]
    with pytest.raises(ValueError, match=named):
        optimizer.load_state_dict(state_dict)
    assert_same(snapshot(optimizer), before)
    assert optimizer.param_groups[0]["lr"] == lr


def test_loading_keeps_what_the_file_does_not_have_out():
    """States of parameters that the file has none of would stay, as of another run."""
    params = parameters()
    optimizer = AdamW(params)
    train(optimizer, params[:2], range(1))
    saved = copy.deepcopy(optimizer.state_dict())
    train(optimizer, params, range(1, 3))
    optimizer.load_state_dict(saved)
    assert set(optimizer.state) == set(params[:2])
    train(optimizer, params, range(1, 2))
    assert [optimizer.state[p]["step"] for p in params] == [2, 2, 1, 1, 1]


def test_states_in_8_bits_are_bytes_that_mean_the_state():
    """Codes and scales would not be those of the state, or small parameters be in 8 bits too."""
    params = parameters(shapes=((64, 80), (64, 63)))
    optimizer = AdamW8bit(params)
    set_gradients(params, 0)
    optimizer.step()
    large, small = (optimizer.state[p] for p in params)
    assert small["exp_avg"].dtype == torch.float32  # 4032 elements
    expected = reference_optim.encode_state(params[0].grad.flatten() * torch.tensor(1 - 0.9), signed=True)
    assert torch.equal(large["exp_avg"].flatten(), expected[0])
    assert torch.equal(large["exp_avg_absmax"], expected[1])
    assert optimizer.state_bytes < 2.1 * 64 * 80 + 8 * 64 * 63 + 2048


@by_class
def test_closures_and_schedulers_and_hooks(cls):
    """torch's interface: a closure's loss is returned, schedules set lr, hooks are called."""
    params = parameters(shapes=((3, 4),))
    optimizer = cls(params, lr=0.1)
    called = []
    optimizer.register_step_pre_hook(lambda *_: called.append("before"))
    optimizer.register_step_post_hook(lambda *_: called.append("after"))
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)

    def closure():
        optimizer.zero_grad()
        loss = params[0].square().sum()
        loss.backward()
        return loss

    first = float(params[0].detach().square().sum())
    assert optimizer.step(closure).item() == pytest.approx(first)
    schedule.step()
    assert optimizer.param_groups[0]["lr"] == 0.05
    assert optimizer.step(closure).item() < first
    assert called == ["before", "after"] * 2


def test_state_dict_hooks():
    """Libraries that change state dicts by torch's hooks would not be asked."""
    params = parameters()
    optimizer = AdamW(params)
    train(optimizer, params, range(1))
    seen = []
    optimizer.register_load_state_dict_pre_hook(lambda _, state: {**state, "extra": seen.append("before")})
    optimizer.register_load_state_dict_post_hook(lambda _: seen.append("after"))
    optimizer.register_state_dict_post_hook(lambda _, state: {**state, "more": 1})
    saved = optimizer.state_dict()
    assert saved["more"] == 1
    optimizer.load_state_dict(saved)
    assert seen == ["before", "after"]


@pytest.mark.parametrize("cls", [AdamW, AdamW8bit])
def test_grad_scaler(cls):
    """A step with inf in a scaled gradient would be made, or gradients stay scaled."""
    params, plain = parameters(), parameters()
    optimizer, expected = cls(params, lr=1e-2), cls(plain, lr=1e-2)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for step in range(3):
        set_gradients(plain, step)
        scaler.scale(torch.zeros(1))  # makes the scale
        for p, q in zip(params, plain, strict=True):
            p.grad = q.grad * 2**10 * (torch.inf if step == 1 else 1)
        scaler.step(optimizer)
        if step != 1:
            expected.step()
        scaler.update(2.0**10)
    assert_same(snapshot(optimizer), snapshot(expected))


def test_groups_have_settings_of_their_own():
    """A group's settings, and those of one that is added later, would be the first group's."""
    params = parameters(shapes=((4, 5), (4, 5), (80, 90)))
    start = params[0].detach().clone()
    params[1].data.copy_(start)
    optimizer = AdamW([{"params": params[:1], "lr": 1.0, "weight_decay": 0.0}, {"params": params[1:2], "lr": 0.5}])
    for p in params[:2]:
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert torch.allclose(params[0], start - 1.0, atol=1e-5)
    assert torch.allclose(params[1], start * (1 - 0.5 * 0.01) - 0.5, atol=1e-5)
    optimizer.add_param_group({"params": params[2], "lr": 0.25, "weight_decay": 0.0, "bits": 8})
    before = params[2].detach().clone()
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert torch.allclose(params[2], before - 0.25, atol=1e-5)
    assert [optimizer.state[p]["step"] for p in params] == [2, 2, 1]
    assert optimizer.state[params[2]]["exp_avg"].dtype == torch.uint8
    with pytest.raises(ValueError, match="more than one"):
        optimizer.add_param_group({"params": params[:1]})
    with pytest.raises(ValueError, match="lr: expected"):
        optimizer.add_param_group({"params": parameters(), "lr": -1.0})
    assert len(optimizer.param_groups) == 3


def test_parameters_come_and_go():
    """A parameter without a gradient in some steps would be decayed, or its steps be counted."""
    params, theirs = parameters(), parameters()
    ours, torchs = AdamW(params, lr=1e-2), torch.optim.AdamW(theirs, lr=1e-2)
    for step, present in enumerate(([0, 1], [0, 3], [], [0, 1, 2, 3, 4], [1])):
        for some, optimizer in ((params, ours), (theirs, torchs)):
            optimizer.zero_grad()
            set_gradients([some[i] for i in present], step)
            optimizer.step()
    for p, q in zip(params, theirs, strict=True):
        assert torch.allclose(p, q, atol=1e-5)
        assert ours.state[p]["step"] == int(torchs.state[q]["step"])


def test_parameters_that_are_not_contiguous():
    """A transposed parameter would be changed in the order of its memory."""
    start = torch.randn(30, 40, generator=torch.Generator().manual_seed(0))
    plain, strided = nn.Parameter(start.clone()), nn.Parameter(start.T.contiguous().T)
    channels = nn.Parameter(torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last))
    optimizer = AdamW([plain, strided, channels])
    for step in range(2):
        set_gradients([plain, channels], step)
        strided.grad = plain.grad.T.contiguous().T
        optimizer.step()
    assert not strided.is_contiguous()
    assert torch.equal(plain, strided)
    assert torch.equal(optimizer.state[plain]["exp_avg"], optimizer.state[strided]["exp_avg"])


@pytest.mark.parametrize("policy", [None, "skip", "raise"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_gradients_that_are_not_finite(policy, bad):
    """One NaN would spoil all states, or a step be left out in silence."""
    params = parameters()
    optimizer = AdamW(params, lr=1e-2, on_nonfinite=policy)
    train(optimizer, params, range(2))
    before = snapshot(optimizer)
    set_gradients(params, 2)
    params[3].grad[4, 5] = bad
    if policy == "raise":
        with pytest.raises(FloatingPointError, match="gradients: expected finite"):
            optimizer.step()
    else:
        optimizer.step()
    if policy is None:
        assert not params[3].isfinite().all()
    else:
        assert_same(snapshot(optimizer), before)
        assert optimizer.skipped_steps == (policy == "skip")


@pytest.mark.parametrize("limit", [0.1, 1e9])
def test_clipping_by_the_common_norm(limit):
    """The fused clipping would use another norm than torch's, change the gradients, or not return the norm."""
    params, theirs = parameters(), parameters()
    ours, plain = AdamW(params, lr=1e-2, max_grad_norm=limit), AdamW(theirs, lr=1e-2)
    for step in range(3):
        set_gradients(params, step)
        set_gradients(theirs, step)
        kept = [p.grad.clone() for p in params]
        norm = torch.nn.utils.clip_grad_norm_(theirs, limit)
        returned = ours.step()
        plain.step()
        assert float(returned) == pytest.approx(float(norm), rel=1e-5) == float(ours.grad_norm)
        assert all(torch.equal(p.grad, grad) for p, grad in zip(params, kept, strict=True))
    ours.zero_grad()
    assert ours.step() is None  # not the norm of another step
    for p, q in zip(params, theirs, strict=True):
        assert torch.allclose(p, q, atol=1e-5)


def test_small_updates_survive_stochastic_rounding():
    """bf16 parameters whose steps are below half of their last bit would never change."""
    ones = {name: nn.Parameter(torch.ones(20000, dtype=torch.bfloat16)) for name in ("nearest", "random")}
    for name, p in ones.items():
        optimizer = AdamW([p], lr=1e-4, weight_decay=0.0, stochastic_rounding=name == "random")
        for _ in range(100):
            p.grad = torch.ones_like(p)
            optimizer.step()
    assert bool((ones["nearest"] == 1).all())
    # The mean of 20,000 values that are off by a bit or so, 2^-8: 2^-8 / sqrt(20000) = 3e-5, times 5.
    assert float(ones["random"].float().mean()) == pytest.approx(0.99, abs=3e-4)


@pytest.mark.parametrize(
    ("make", "error", "named"),
    [
        (lambda p: AdamW(p, lr=-1.0), ValueError, "lr"),
        (lambda p: AdamW(p, lr=float("nan")), ValueError, "lr"),
        (lambda p: AdamW(p, betas=(1.0, 0.9)), ValueError, "betas"),
        (lambda p: AdamW(p, betas=(0.9, -0.1)), ValueError, "betas"),
        (lambda p: AdamW(p, betas=0.9), ValueError, "betas"),
        (lambda p: AdamW(p, eps=-1.0), ValueError, "eps"),
        (lambda p: AdamW(p, weight_decay=-1.0), ValueError, "weight_decay"),
        (lambda p: AdamW(p, max_grad_norm=0.0), ValueError, "max_grad_norm"),
        (lambda p: AdamW(p, on_nonfinite="stop"), ValueError, "on_nonfinite"),
        (lambda p: AdamW(p, stochastic_rounding=1), TypeError, "stochastic_rounding"),
        (lambda p: AdamW([]), ValueError, "empty"),
        (lambda p: AdamW([p[0].detach()]), ValueError, "requires gradients|require gradients"),
        (lambda p: AdamW([p[0].detach().double().requires_grad_()]), TypeError, "float64"),
        (lambda p: AdamW([{"params": p, "bits": 4}]), ValueError, "bits"),
        (lambda p: AdamW(p, paged_to="."), ValueError, "paged_to"),
        (lambda p: PagedAdamW(p, paged_to="/no/such/folder"), (ValueError, OSError), "folder"),
    ],
)
def test_bad_arguments(make, error, named):
    """Training would begin with a setting that cannot be meant."""
    with pytest.raises(error, match=named):
        make(parameters())


def test_sparse_gradients_are_refused():
    """A sparse gradient would be read as a dense one."""
    embedding = nn.Embedding(10, 4, sparse=True)
    other = nn.Parameter(torch.ones(3))
    optimizer = AdamW([other, *embedding.parameters()])
    (embedding(torch.tensor([1, 2])).sum() + other.sum()).backward()
    before = other.detach().clone()
    with pytest.raises(TypeError, match="sparse=False"):
        optimizer.step()
    assert torch.equal(other, before)


def test_a_parameter_that_grew_is_refused():
    """States of the old size would be read past their end."""
    params = parameters()
    optimizer = AdamW(params)
    train(optimizer, params, range(1))
    params[0].data = torch.zeros(100, 100)
    set_gradients(params, 1)
    with pytest.raises(ValueError, match="sizes of the first step"):
        optimizer.step()


def test_autograd_knows_that_parameters_have_changed():
    """A backward through a graph made before the step would use the new values in silence."""
    p = nn.Parameter(torch.randn(3, 3))
    optimizer = AdamW([p])
    loss = (p @ p).sum()
    p.grad = torch.ones_like(p)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_constants_of_late_steps():
    """After many steps a correction of exactly 1 would become NaN or inf."""
    params = parameters()
    optimizer = AdamW(params)
    train(optimizer, params, range(1))
    saved = optimizer.state_dict()
    for state in saved["state"].values():
        state["step"] = 10**9
    optimizer.load_state_dict(saved)
    train(optimizer, params, range(1))
    assert all(math.isfinite(float(p.abs().sum())) for p in params)


def test_saved_files(tmp_path, monkeypatch):
    """A save that fails would leave no file, or half of one; a file of something else would be taken for a state."""
    params, path = parameters(), tmp_path / "optimizer.pt"
    optimizer = AdamW8bit(params, lr=1e-2)
    train(optimizer, params, range(2))
    optimizer.save(path)
    saved = snapshot(optimizer)
    train(optimizer, params, range(2, 3))

    def full(state_dict, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(torch, "save", full)
        with pytest.raises(OSError, match="No space"):
            optimizer.save(path)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    optimizer.load(path)
    assert_same(([], snapshot(optimizer)[1]), ([], saved[1]))

    (tmp_path / "garbage").write_bytes(b"not a state")
    torch.save([1, 2], tmp_path / "list")
    Lion8bit(params).save(tmp_path / "lion")
    for name, named in (("garbage", "garbage: expected a file"), ("list", "got list"), ("lion", "rule='adamw'")):
        with pytest.raises(ValueError, match=named):
            optimizer.load(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        optimizer.load(tmp_path / "none")
    assert_same(([], snapshot(optimizer)[1]), ([], saved[1]))

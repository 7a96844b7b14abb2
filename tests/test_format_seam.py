"""A made-up format with MXFP4's codes and scales works on the reference by its record alone."""

import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lowbit
from lowbit import WeightSpec
from lowbit import format as fmt

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def _exponent(largest: torch.Tensor) -> torch.Tensor:
    """The biased exponent of the least power of two that brings the largest magnitude of a block to at most 6."""
    return (torch.ceil(torch.log2(largest.clamp(min=2.0**-100) / 6)) + 127).to(torch.uint8)


def _power(exponent: torch.Tensor) -> torch.Tensor:
    return torch.exp2(exponent.float() - 127)


@pytest.fixture(autouse=True)
def mx4():
    """Register the format for one test, which runs on the reference, the only backend that serves it."""
    scales = fmt.ScaleKind(dtype=torch.uint8, encode=_exponent, decode=_power)
    fmt.register(fmt.Format("mx4", 4, E2M1 + tuple(-value for value in E2M1), scales, (32,)))
    with lowbit.use_backend("reference"):
        yield
    del fmt.FORMATS["mx4"]
    WeightSpec.parse.cache_clear()


def _expected(weight: torch.Tensor) -> torch.Tensor:
    """The weight that the format stores, computed by nearest values and not by midpoints."""
    blocks = weight.reshape(-1, 32)
    scale = 2.0 ** torch.ceil(torch.log2(blocks.abs().amax(1, keepdim=True) / 6))
    values = torch.tensor(E2M1 + tuple(-value for value in E2M1))
    nearest = values[(blocks[..., None] / scale[..., None] - values).abs().argmin(-1)]
    return (nearest * scale).reshape(weight.shape)


def test_bytes():
    """A format's record would not say all: codes, scales or sizes would come from another one's."""
    weight = torch.randn(6, 64, generator=torch.Generator().manual_seed(0))
    q = lowbit.quantize(weight, format="mx4", block_size=32)
    assert (str(q.spec), q.packed.dtype, q.absmax.dtype) == ("mx4:32", torch.uint8, torch.uint8)
    assert q.nbytes == 6 * 64 // 2 + 6 * 64 // 32
    assert torch.equal(q.dequantize(), _expected(weight))
    with pytest.raises(ValueError, match="block_size: expected 32, got 64"):
        WeightSpec("mx4", 64)


def test_training():
    """A new format would need code of its own in layers, LoRA, the backward, copies or files."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 40), nn.Tanh(), nn.Linear(40, 3))  # 40: rows cut blocks
    lowbit.quantize_(model, WeightSpec("mx4", 32, False))
    lora = [nn.Parameter(torch.randn(4, 64) / 8), nn.Parameter(torch.zeros(40, 4))]
    x, labels = torch.randn(16, 64), torch.randint(0, 3, (16,))
    first = model[0]

    def losses(weight: torch.Tensor, product, steps: int = 5) -> list[float]:
        a, b = (nn.Parameter(p.detach().clone()) for p in lora)
        optimizer = torch.optim.Adam([a, b], 1e-2)
        seen = []
        for _ in range(steps):
            y = product(x, weight, a, b)
            loss = F.cross_entropy(model[2](model[1](y)), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            seen.append(loss.item())
        return seen

    ours = losses(first.weight, lambda x, q, a, b: lowbit.lora_linear(x, q, a, b, 2.0, first.bias))
    dense = first.weight.dequantize()
    theirs = losses(dense, lambda x, w, a, b: F.linear(x, w, first.bias) + 2 * F.linear(F.linear(x, a), b))
    assert ours[-1] < ours[0]
    # The sums of 64 terms differ in order. Five steps of Adam keep that below a thousandth of a loss.
    assert ours == pytest.approx(theirs, abs=64 * 2.0**-24 * 5 * max(theirs))

    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    loaded = lowbit.quantize_(
        nn.Sequential(nn.Linear(64, 40), nn.Tanh(), nn.Linear(40, 3)), WeightSpec("mx4", 32, False)
    )
    loaded.load_state_dict(torch.load(io.BytesIO(file.getvalue())))
    assert torch.equal(loaded(x), model(x))
    assert torch.equal(F.linear(x, first.weight[3:7]), F.linear(x, dense[3:7]))


def test_name_is_taken():
    """Two formats of one name would decode each other's weights."""
    with pytest.raises(ValueError, match="'nf4', which there is"):
        fmt.register(fmt.FORMATS["nf4"])

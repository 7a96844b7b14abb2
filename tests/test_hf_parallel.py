"""Training on many processes through accelerate: examples/train_many_gpus.py under the configs that ship with it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.testing._internal.distributed.fake_pg
from hf_models import SIZES, load, save_dense
from safetensors.torch import load_file

from lowbit import QuantizedTensor, WeightSpec
from lowbit.parts import columns_of, rows_of
from lowbit.quantizers.quantize import quantize_to
from lowbit_lora import LowbitConfig, QLoRAConfig, QLoRAModel
from lowbit_lora.hf import parallel

accelerate = pytest.importorskip("accelerate")
pytest.importorskip("peft")
tokenizers = pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")
parallel_training = pytest.importorskip("parallel_training")

TESTS = Path(__file__).parent
SCRIPT = str(TESTS / "parallel_training.py")
EXAMPLE = str(TESTS.parent / "examples/train_many_gpus.py")
ROWS, STEPS = 4, 3  # rows of a step over all processes
FORKED = ("ddp:4", "fsdp2:2", "fsdp2:4")
TENSOR, STATE = "tensor:2", "state:2"
TORCHRUN = ("torchrun", "trainer")
RUNS = [TORCHRUN, *((run, kind) for run in FORKED for kind in ("loop", "trainer"))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model of 4 heads with a tokenizer of numbers, a text, and what the runs wrote about them."""
    folder = tmp_path_factory.mktemp("parallel")
    save_dense(folder / "model", dtype=torch.float32, **SIZES | {"num_key_value_heads": 4, "intermediate_size": 128})
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({str(i): i for i in range(64)}, unk_token="0"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder / "model")
    ids = torch.randint(0, 64, (8 * ROWS * STEPS,), generator=torch.Generator().manual_seed(0))
    (folder / "text").write_text(" ".join(map(str, ids.tolist())))
    return folder


def options(folder: Path, rows: int) -> list[str]:
    files = ["--model", str(folder / "model"), "--text", str(folder / "text")]
    numbers = {"length": 8, "steps": STEPS, "lr": 0.01, "batch-size": rows, "save-steps": STEPS}
    return files + [f"--{name}={value}" for name, value in numbers.items()]


def start(arguments: list[str]) -> None:
    path = os.pathsep.join([str(TESTS.parent), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=300)
    assert not done.returncode, done.stderr[-4000:]


@pytest.fixture(scope="module")
def runs(folder):
    """The folder, once every run has ended: one by torchrun, the others forked."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", EXAMPLE]
    start([*torchrun, "--trainer", "--output", str(folder.joinpath(*TORCHRUN)), *options(folder, ROWS // 2)])
    start([SCRIPT, str(folder), ",".join([*FORKED, TENSOR, STATE]), str(ROWS), *options(folder, ROWS)])
    return folder


@pytest.fixture(scope="module")
def one(folder):
    """``(losses, model)`` of one process that does the same steps, in plain torch."""
    torch.manual_seed(0)
    base = load(folder / "model", quantization_config=LowbitConfig())
    transformers.set_seed(0)
    model = QLoRAModel(base, QLoRAConfig(rank=8)).train()
    ids = torch.tensor([int(word) for word in (folder / "text").read_text().split()]).view(STEPS, ROWS, 8)
    optimizer = torch.optim.AdamW(model.trainable_parameters(), lr=0.01, weight_decay=0.0)
    losses = []
    for rows in ids:
        loss = model(input_ids=rows, labels=rows).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, model


@pytest.mark.parametrize(("run", "kind"), RUNS)
def test_losses_are_those_of_one_process(runs, one, run, kind):
    """Several GPUs would train something else: other rows, gradients that are not the mean, weights that differ."""
    losses = json.loads((runs / run / kind / "losses.json").read_text())
    # Sums over processes have another order. Trainer logs four digits.
    torch.testing.assert_close(losses, one[0], rtol=1e-5, atol=1e-4 if kind == "trainer" else 0)


@pytest.mark.parametrize(("run", "kind"), RUNS)
def test_the_saved_adapter_is_whole(runs, one, run, kind):
    """The file would hold a part of the factors, or those of one process: it could not be used by itself."""
    base = load(runs / "model", quantization_config=LowbitConfig())
    model = QLoRAModel.from_pretrained(base, runs / run / kind)
    ids = torch.arange(16).view(2, 8)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, one[1].eval()(ids).logits, rtol=1e-3, atol=1e-3)
    if kind == "trainer":
        name = "adapter_model.safetensors"
        saved, checkpoint = (load_file(runs / run / kind / at / name) for at in ("", f"checkpoint-{STEPS}"))
        assert saved.keys() == checkpoint.keys()
        assert all(torch.equal(saved[key], checkpoint[key]) for key in saved)


def seen(runs: Path, run: str) -> list[dict]:
    ranks = int(run.partition(":")[2])
    return [json.loads((runs / run / f"seen.{rank}").read_text()) for rank in range(ranks)]


@pytest.mark.parametrize("run", [run for run in FORKED if "ddp" in run])
def test_ddp_never_sends_the_base(runs, one, run):
    """accelerate's DDP would send the base over the network, which is many times the adapter."""
    parameters = [p for p in one[1].parameters() if not isinstance(p, QuantizedTensor)]
    dense = sum(p.nbytes for p in parameters)
    trained = sum(p.nbytes for p in parameters if p.requires_grad)
    buffers = sum(buffer.nbytes for buffer in one[1].buffers())  # DDP sends them at each step
    for rank in seen(runs, run):
        assert rank["loop"]["sent"]["broadcast_"] == dense + buffers * (1 + STEPS)
        assert rank["loop"]["sent"]["allreduce_"] <= STEPS * (trained + 8)  # with the losses


@pytest.mark.parametrize("run", [run for run in FORKED if "fsdp2" in run])
def test_fsdp2_shards_the_base(runs, one, run):
    """accelerate would leave the base whole on each GPU, as it does with bitsandbytes' uint8 weights."""
    ranks = int(run.partition(":")[2])
    whole = sum(p.packed.nbytes for p in one[1].parameters() if isinstance(p, QuantizedTensor))
    for rank in seen(runs, run):
        assert rank["loop"]["codes"] * ranks == rank["trainer"]["codes"] * ranks == whole


@pytest.mark.parametrize("kind", ["FULL_STATE_DICT", "SHARDED_STATE_DICT"])
def test_a_state_of_accelerate_resumes_under_fsdp2(runs, kind):
    """A run that was interrupted would end at another model, or fail when its state is loaded."""
    for rank in range(2):
        through, resumed = json.loads((runs / STATE / f"losses.{rank}").read_text())[kind]
        assert resumed == through and through[1] < through[0]


def test_tensor_parallel(runs):
    """A model that is split over two GPUs would compute, or learn, something else than on one."""
    model = parallel_training.adapted(str(runs / "model"))
    expected = parallel_training.gradients(model)
    ranks = [torch.load(runs / TENSOR / f"results.{rank}") for rank in range(2)]
    for name, value in expected.items():
        got = [rank[name] for rank in ranks]
        dim = next((dim for dim in (0, 1) if got[0].shape[dim] != value.shape[dim]), None)
        whole = [torch.cat(got, dim)] if dim is not None else got  # of a part, or the same in each process
        for one in whole:
            torch.testing.assert_close(one, value, rtol=1e-4, atol=1e-5 * value.abs().max().item(), msg=name)
    split = {name for name, value in expected.items() if ranks[0][name].shape != value.shape}
    assert len(split) == 14  # a factor of each adapter
    codes = sum(p.packed.nbytes for p in model.parameters() if isinstance(p, QuantizedTensor))
    assert all(rank["codes"] * 2 == codes for rank in ranks)


def test_tensor_parallel_saves_whole_adapters(runs):
    """The file would hold one process's part."""
    model = parallel_training.adapted(str(runs / "model"))
    saved = load_file(runs / TENSOR / "adapter_model.safetensors")
    state = model.adapter_state_dict()
    assert saved.keys() == state.keys()
    assert all(torch.equal(saved[key], state[key]) for key in saved)


@pytest.fixture
def two_ranks():
    """This process takes itself for the first of two, without the other."""
    store = torch.testing._internal.distributed.fake_pg.FakeStore()
    torch.distributed.init_process_group("fake", store=store, rank=0, world_size=2)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    "config, plan, message",
    [
        (
            LowbitConfig(block_size=64),
            None,
            r"layers.0.self_attn.o_proj: columns 0 to 32: expected cuts between blocks",
        ),
        (LowbitConfig(block_size=32), {"model.layers.*.mlp": "moe_tp_experts"}, "got 'moe_tp_experts'"),
        (LowbitConfig(block_size=32), {"model.norm": "colwise"}, "model.norm: expected a linear layer to split"),
        (LowbitConfig(block_size=32), {"nowhere": "colwise"}, "expected one that means linear layers"),
    ],
)
def test_what_cannot_be_split_is_refused(folder, two_ranks, config, plan, message):
    """A wrong part would be computed with, or half of the model would be split when the error comes."""
    model = load(folder / "model", quantization_config=config)
    before = {name: tuple(p.shape) for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match=message):
        parallel.tensor_parallel_(model, plan=plan)
    assert {name: tuple(p.shape) for name, p in model.named_parameters()} == before


@pytest.mark.parametrize(
    "spec", [WeightSpec(), WeightSpec("nf4", 32, False), WeightSpec("fp4", 64), WeightSpec("int8")]
)
def test_parts_of_a_weight(spec):
    """A process would compute with other values than the weight's."""
    q = quantize_to(torch.randn(512, 128), spec)
    for begin, end in ((0, 256), (256, 512), (3, 70)):
        part = rows_of(q, begin, end)
        assert torch.equal(part.dequantize(), q.dequantize()[begin:end])
        aligned = begin % 256 == 0  # a group of 256 blocks begins there
        assert part.spec == (spec if aligned else spec.without_double_quant())
    for begin, end in ((0, 64), (64, 128)):
        assert torch.equal(columns_of(q, begin, end).dequantize(), q.dequantize()[:, begin:end])
    with pytest.raises(ValueError, match="begin and end: expected a part of 128, got 64 to 129"):
        columns_of(q, 64, 129)


@pytest.mark.parametrize("stored", [False, True], ids=["dense", "quantized"])
def test_splitting_while_loading_is_refused(folder, two_ranks, monkeypatch, tmp_path, stored):
    """Each process would quantize, or read, a part of the bytes of a weight, and fail far from the cause."""
    options = {"quantization_config": LowbitConfig()}
    if stored:
        load(folder / "model", **options).save_pretrained(tmp_path)
        options = {}
    for name, value in {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=r"tp_plan and distributed_config: .*parallel\.tensor_parallel_\(model\)"):
        load(tmp_path if stored else folder / "model", tp_plan="auto", **options)


def test_sharded_checkpoints_are_refused():
    """Trainer would stop at its first checkpoint with an AttributeError of PEFT's."""
    from accelerate.utils.fsdp_utils import _get_model_state_dict
    from conftest_models import llama

    model = QLoRAModel(llama(), QLoRAConfig(rank=2))
    with pytest.raises(RuntimeError, match="fsdp_state_dict_type: expected FULL_STATE_DICT"):
        _get_model_state_dict(model, adapter_only=True)


def test_zero3_is_refused(folder, monkeypatch):
    """DeepSpeed would split the codes as if they were floats, and fail far from the cause."""
    monkeypatch.setattr(transformers.integrations.deepspeed, "is_deepspeed_zero3_enabled", lambda: True)
    with pytest.raises(ValueError, match="expected ZeRO stage 0, 1 or 2 with quantized weights, got stage 3"):
        load(folder / "model", quantization_config=LowbitConfig())
    with pytest.raises(ValueError, match="fsdp2.yaml"):
        parallel.check_not_zero3()

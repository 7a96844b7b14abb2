"""Quantized weights under DDP, FSDP2 and distributed checkpoints, in spawned processes that use gloo."""

import distributed_cases as cases
import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import CPUOffloadPolicy

from lowbit import QuantizedTensor

RANKS = (2, 4)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """``results(case, ranks)``: what each rank returned. The files of two processes are read by four."""
    folder = tmp_path_factory.mktemp("distributed")
    cases.spawn(2, folder, cases.ddp_case, cases.fsdp_case, cases.two_batches_case)
    cases.spawn(4, folder, cases.fsdp_case)

    def of(case: str, ranks: int) -> list[dict]:
        return [torch.load(folder / f"{case}_case.{ranks}.{rank}") for rank in range(ranks)]

    return of


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Use one thread, as the processes do, so that sums have the same order here."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def one_rank(tmp_path):
    """This process is a group by itself."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def assert_equal(ours: dict, theirs: dict) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert torch.equal(ours[name], value), name


@pytest.mark.parametrize("wrapped", ["bare", "container"])
def test_ddp_trains_like_one_process(results, wrapped):
    """Two processes under DDP would train something else than one process with both batches."""
    expected = cases.train(cases.model(), cases.BATCHES)
    for rank in results("ddp", 2):
        assert_equal(rank[wrapped], expected)


@pytest.mark.parametrize("wrapped", ["bare", "container"])
def test_ddp_sends_adapters_only(results, wrapped):
    """DDP would send the base over the network: at the start, or at every step."""
    module = cases.model()
    dense = sum(p.nbytes for p in module.parameters() if not isinstance(p, QuantizedTensor))
    trainable = sum(p.nbytes for p in module.parameters() if p.requires_grad)
    for rank in results("ddp", 2):
        assert rank[f"sent {wrapped}"] == {"broadcast_": dense}
        assert rank[f"sent in a step {wrapped}"] == {"allreduce_": trainable}


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("reshard", [True, False])
def test_fsdp_trains_like_one_process(results, ranks, reshard):
    """A weight gathered from its shards would not be the weight: wrong blocks, rows or scales."""
    expected = cases.train(cases.model(), [cases.IDS])
    for rank in results("fsdp", ranks):
        assert_equal(rank[f"fp32 {reshard}"], expected)


def test_fsdp_trains_on_all_batches(results):
    """Two processes under FSDP2 would train something else than one process with both batches."""
    expected = cases.train(cases.model(), cases.BATCHES)
    for rank in results("two_batches", 2):
        assert_equal(rank["fsdp"], expected)


@pytest.mark.parametrize("options", [{}, {"reshard_after_forward": False}, {"offload_policy": CPUOffloadPolicy(False)}])
def test_fsdp_of_one_rank(one_rank, options):
    """A script for many GPUs would fail on one, or train something else."""
    module = cases.shard(cases.model(), **options)
    assert_equal(cases.train(module, cases.BATCHES), cases.train(cases.model(), cases.BATCHES))


@pytest.mark.parametrize("ranks", RANKS)
def test_fsdp_in_bf16(results, ranks):
    """Under FSDP's bf16 policy the base would not take part in bf16, or lose bits of its own."""
    expected = cases.gradients(cases.model().bfloat16())
    for rank in results("fsdp", ranks):
        assert_equal(rank["bf16"], expected)


@pytest.mark.parametrize("ranks", RANKS)
def test_fsdp_shards_the_bytes(results, ranks):
    """Each process would hold the whole base, and a model that fits on n GPUs would not."""
    weights = [p for p in cases.model().parameters() if isinstance(p, QuantizedTensor)]
    # The first rank has the most rows. A rank's rows may begin and end inside of blocks that it holds whole.
    most = 0
    for q in weights:
        rows, block = -(-q.shape[0] // ranks), q.spec.packed_size(q.spec.block_size or 1)
        most += q.spec.packed_size(rows * q[0].numel()) + 2 * block
    held = [rank["bytes"] for rank in results("fsdp", ranks)]
    assert max(held) <= most < sum(q.packed.nbytes for q in weights)


@pytest.mark.parametrize("ranks", RANKS)
def test_full_tensor(results, ranks):
    """``full_tensor()`` of a sharded weight, by which tools save a model, would give other values."""
    weights = [p for p in cases.model().parameters() if isinstance(p, QuantizedTensor)]
    for rank in results("fsdp", ranks):
        for got, q in zip(rank["weights"], weights, strict=True):
            got = got.dequantize() if isinstance(got, QuantizedTensor) else got
            assert torch.equal(got, q.dequantize()), q


def test_adapters_saved_by_two_are_loaded_by_four(results):
    """A checkpoint of the adapters could not be continued on another number of GPUs."""
    for rank in results("fsdp", 4):
        assert_equal(rank["loaded"], cases.trained(cases.model()))

"""lowbit_lora/optim under FSDP2, in spawned processes that use gloo: states follow the shards."""

import distributed_cases
import optim_distributed_cases as cases
import pytest
import torch


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """``results(ranks)``: what each rank returned. Four processes go on from the files of two."""
    folder = tmp_path_factory.mktemp("optim")
    for ranks in (2, 4):
        distributed_cases.spawn(ranks, folder, cases.fsdp_case)
    return lambda ranks: [torch.load(folder / f"fsdp_case.{ranks}.{rank}") for rank in range(ranks)]


def one_process(kind, steps):
    module = cases.model()
    # Under FSDP2 the states of weights whose rows are not whole blocks have 32 bits.
    cut = [module[2].weight]
    groups = [{"params": [p for p in module.parameters() if p is not cut[0]]}, {"params": cut, "bits": 32}]
    optimizer = cases.KINDS[kind](groups, **cases.OPTIONS)
    cases.train(module, optimizer, range(steps))
    return cases.result(module, optimizer)


@pytest.mark.parametrize("kind", cases.KINDS)
@pytest.mark.parametrize("ranks", [2, 4])
def test_trains_like_one_process(results, kind, ranks):
    """Shards would be stepped with other norms, scales or states than the whole parameters."""
    expected = one_process(kind, 5)
    for rank in results(ranks):
        found = rank[f"{kind} 5"]
        assert found["norm"] == pytest.approx(expected["norm"], rel=1e-5)
        for name in (n for n in expected if n.endswith(("weight", "bias"))):
            # Codes of 8 bits are those of other values where a gradient's last bit differs: a step of the map.
            limit = 1e-6 if kind == "adamw" else 2e-4
            assert torch.allclose(found[name], expected[name], atol=limit), name


@pytest.mark.parametrize("kind", cases.KINDS)
def test_saved_by_two_and_loaded_by_four(results, kind):
    """States would be lost or changed where a run goes on with another number of processes."""
    two, four = results(2), results(4)
    saved = two[0][f"{kind} 3"]
    for rank in four:
        loaded = rank[f"{kind} 3"]
        for name in saved.keys() - {"norm", "bytes"}:
            assert torch.equal(torch.as_tensor(loaded[name]), torch.as_tensor(saved[name])), name
    assert saved["0.weight exp_avg"].dtype == (torch.float32 if kind == "adamw" else torch.uint8)


def test_states_are_sharded(results):
    """Each process would hold the states of all."""
    whole = one_process("adamw", 1)["bytes"]
    assert all(rank["adamw 5"]["bytes"] < 0.4 * whole for rank in results(4))

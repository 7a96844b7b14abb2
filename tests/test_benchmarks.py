"""The benchmarks as users run them: they finish, write what they promise, and fail on a wrong result."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import lowbit
from lowbit.backends import native

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
pytestmark = pytest.mark.skipif(native.missing_reason() is not None, reason="no compiled extension")


def run(script, *arguments):
    return subprocess.run(
        [sys.executable, BENCHMARKS / script, *arguments], capture_output=True, text=True, timeout=600, check=False
    )


@pytest.fixture
def bench_matmul(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import bench_matmul

    yield bench_matmul
    torch.ops.lowbit.set_cpu_isa("auto")


def test_bench_matmul_writes_its_report(tmp_path):
    """Users compare machines by these files."""
    operations = "linear,dequantize,quantize,int8,search,overhead"
    files = ("--json", tmp_path / "r.json", "--plot", tmp_path / "r.png")
    done = run("bench_matmul.py", "--quick", "--backward", "--ops", operations, *files)
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["machine"]["read_bandwidth"] > 0 and report["machine"]["peak"] > 0
    ours = [row for row in report["rows"] if row["name"].startswith("lowbit")]
    names = {"linear", "backward dX", "dequantize into out", "quantize", "quantize, search", "linear, precision int8"}
    assert names <= {row["operation"] for row in ours}
    for row in ours:
        assert row["p20_ms"] <= row["median_ms"] <= row["p80_ms"]
        assert not row.get("wrong")
    linear = next(row for row in ours if row["operation"] == "linear")
    assert {"gb_per_s", "gflop_per_s", "bandwidth_share", "peak_share", "vs_best_dense", "error"} <= set(linear)
    assert (tmp_path / "r.png").stat().st_size > 10_000


def test_bench_matmul_beside_a_busy_process(tmp_path):
    """Many users share their machine, and choose by what a library does there."""
    done = run("bench_matmul.py", "--quick", "--beside", "--dtype", "float32", "--json", tmp_path / "b.json")
    assert done.returncode == 0, done.stderr[-2000:]
    rows = json.loads((tmp_path / "b.json").read_text())["rows"]
    ours = [row for row in rows if row["name"] == "lowbit"]
    assert [row["work"] for row in ours] == ["128x256, m=1", "128x256, m=8"]
    for row in ours:
        assert row["idle_ms"] > 0 and row["ratio"] == pytest.approx(row["beside_ms"] / row["idle_ms"])


def test_the_busy_process_ends_on_errors(monkeypatch):
    """A benchmark that fails must not leave a core busy."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import beside

    started = []
    popen = subprocess.Popen
    monkeypatch.setattr(
        subprocess, "Popen", lambda *args, **options: started.append(popen(*args, **options)) or started[0]
    )
    with pytest.raises(ZeroDivisionError), beside.busy_core():
        assert started[0].poll() is None
        raise ZeroDivisionError
    assert started[0].poll() is not None


def test_bench_matmul_fails_on_a_wrong_result(bench_matmul, monkeypatch, capsys):
    """A fast wrong kernel must not get a row and a zero exit status."""
    right = lowbit.linear
    monkeypatch.setattr(lowbit, "linear", lambda x, q, *rest, **options: right(x, q, *rest, **options) * 1.1)
    assert bench_matmul.main(["--quick", "--ops", "linear", "--dtype", "float32"]) == 1
    assert "WRONG" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shapes", "4096"], "expected one of default"),
        (["--m", "0"], "expected numbers of rows of at least 1"),
        (["--ops", "linear,sort"], "got 'sort'"),
        (["--rounds", "0"], "--rounds: expected at least 1"),
        (["--train"], "--train only with it"),
    ],
)
def test_bench_matmul_bad_arguments(bench_matmul, capsys, arguments, message):
    """A typo is an error at once, not after an hour of timing."""
    with pytest.raises(SystemExit) as exit_info:
        bench_matmul.main(arguments)
    assert exit_info.value.code == 2
    assert message in capsys.readouterr().err


def test_bench_train_writes_its_report(tmp_path):
    """The training benchmark runs each contender it can and compares first losses."""
    files = ("--json", tmp_path / "t.json", "--plot", tmp_path / "t.png")
    done = run("bench_train.py", "--quick", "--dtype", "float32", *files)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-2000:]
    rows = {row["name"]: row for row in json.loads((tmp_path / "t.json").read_text())["rows"]}
    ours = rows["lowbit"]
    assert ours["step_ms"] > 0 and ours["tokens_per_s"] > 0 and ours["peak_mb"] > 0
    assert (tmp_path / "t.png").stat().st_size > 5_000


def test_bench_train_notices_another_loss(monkeypatch):
    """Two libraries that train different functions are not to be compared by speed."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import bench_train

    rows = [
        {"name": "lowbit", "dtype": "float32", "first_loss": 6.0},
        {"name": "PEFT + bitsandbytes", "dtype": "float32", "first_loss": 6.1},
    ]
    assert "first loss" in bench_train.wrong_losses(rows)[0]
    rows[1]["first_loss"] = 6.00001
    assert bench_train.wrong_losses(rows) == []


def test_bench_adapters_writes_its_report(tmp_path):
    """Serving many adapters is bought for this ratio, and swapping them for this time."""
    pytest.importorskip("peft")
    pytest.importorskip("bitsandbytes")
    done = run("bench_adapters.py", "--quick", "--swap", "--dtype", "float32", "--json", tmp_path / "a.json")
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-2000:]
    rows = json.loads((tmp_path / "a.json").read_text())["rows"]
    assert not [row for row in rows if "failed" in row]
    passes = {(row["base"], row["pass"], row["name"]): row for row in rows if row["pass"] != "swap"}
    assert len(passes) == 2 * 2 * 4
    ours = passes["nf4", "forward, backward", "lowbit, 8 adapters"]
    assert ours["vs_one"] > 0 and ours["faster_than_peft"] > 0
    assert len([row for row in rows if row["pass"] == "swap" and row["median_ms"] > 0]) == 4


def test_bench_optim_writes_its_report(tmp_path):
    """The time and the memory of a step are what the optimizers are chosen by."""
    pytest.importorskip("bitsandbytes")
    done = run("bench_optim.py", "--quick", "--paged-to", tmp_path, "--json", tmp_path / "o.json")
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-2000:]
    rows = {row["name"]: row for row in json.loads((tmp_path / "o.json").read_text())["rows"]}
    assert set(rows) >= {"lowbit AdamW", "lowbit PagedAdamW8bit", "torch AdamW, fused", "bitsandbytes AdamW8bit"}
    assert not [name for name, row in rows.items() if "failed" in row and not name.startswith("torchao")]
    for name, states in (("lowbit AdamW", 2), ("lowbit Lion", 1), ("torch AdamW, fused", 2), ("bitsandbytes AdamW", 2)):
        assert rows[name]["state_bytes"] == pytest.approx(4 * states)
    for name in ("lowbit AdamW8bit", "bitsandbytes AdamW8bit"):  # a scale for each 256
        assert rows[name]["state_bytes"] == pytest.approx(2 + 8 / 256)


def test_table_parameters_counts_exactly(monkeypatch, tmp_path, capsys):
    """These are the figures that PEFT and the LoRA paper print for the same choice of layers."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import table_parameters

    models = ["BERT base", "LLaMA 7B"]
    assert table_parameters.main(["--models", *models, "--ranks", "8", "--json", str(tmp_path / "p.json")]) == 0
    assert "4,194,304" in capsys.readouterr().out
    rows = json.loads((tmp_path / "p.json").read_text())["rows"]
    assert [row["lora"] for row in rows] == [294912, 1339392, 4194304, 19988480]
    assert [row["head"] for row in rows] == [1538, 1538, 0, 0]
    assert [row["parameters"] for row in rows] == [109483778] * 2 + [6738415616] * 2


def test_bench_generate_writes_its_report(tmp_path):
    """Users compare decoding by these rows; a contender that fails must not stop the others."""
    done = run("bench_generate.py", "--quick", "--json", tmp_path / "r.json", "--contenders", "lowbit", "lowbit int8")
    assert done.returncode == 0, done.stderr[-2000:]
    rows = {row["name"]: row for row in json.loads((tmp_path / "r.json").read_text())["rows"]}
    assert set(rows) == {"lowbit", "lowbit int8"}
    for row in rows.values():
        assert row["tokens_per_s"] > 0 and 0 < row["bound_share"] < 1


def test_bench_load_prints_its_table(monkeypatch, tmp_path, capsys):
    """Rows would be of another contender, or a library would not quantize and look fast."""
    transformers = pytest.importorskip("transformers")
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import bench_load

    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=512, intermediate_size=1024, num_hidden_layers=1, num_attention_heads=8
    )
    transformers.LlamaForCausalLM(config).bfloat16().save_pretrained(tmp_path / "model")

    def here(name, folder, options, save_to=None):  # a process each takes 5 s
        library, is_quantized = bench_load.CONTENDERS[name]
        if save_to:
            return bench_load.load(folder, library, False, torch.bfloat16).save_pretrained(save_to)
        return bench_load.measure(folder, library, is_quantized, torch.bfloat16)

    monkeypatch.setattr(bench_load, "in_process", here)
    monkeypatch.setattr(sys, "argv", ["bench_load.py", str(tmp_path / "model"), "--rounds", "1"])
    bench_load.main()
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()[-5:]]
    assert [row[0] for row in rows] == list(bench_load.CONTENDERS)
    assert [row[-1] for row in rows] == ["1", "1", "5", "1", "1"]  # 1.48 MB in 4 bits, 5.38 in bf16
    assert all(float(row[1]) > 0 for row in rows)


def test_ratios_that_fell_are_named(bench_matmul, tmp_path):
    """A kernel that became slower than before, next to torch, would land unseen."""
    import ratios

    machine = SimpleNamespace(threads=2, torch_version="2.13.0", lowbit_isa="avx2")
    row = {"operation": "linear", "dtype": "bfloat16", "n": 64, "k": 64, "m": 1, "name": "lowbit", "vs_dense": 2.0}
    path = tmp_path / "recorded.json"
    assert ratios.regressions([row], path) is None
    ratios.record(machine, [row | {"m": 8}], path)
    ratios.record(machine, [row], path)
    assert len(next(iter(ratios.recorded(path).values()))["ratios"]) == 2
    assert ratios.regressions([row | {"vs_dense": 1.7}], path) == []
    assert ratios.regressions([row | {"vs_dense": 1.5}], path) == [
        "linear, bfloat16, 64x64, 1 rows: 1.50 times as fast as dense, recorded 2.00"
    ]
    assert ratios.regressions([row | {"m": 4, "vs_dense": 0.1}], path) == []
    assert ratios.machine_key() in ratios.table(path)


def test_machines_of_the_docs_are_the_recorded_ones(bench_matmul):
    """The page would show a machine's figures that no run printed."""
    import ratios

    assert ratios.table() in (BENCHMARKS.parent / "docs" / "performance.md").read_text()


def test_bench_calibrated_start_trains_each_start_and_counts_steps(monkeypatch):
    """Its table says whether the time of a calibrated start pays; each seed has to begin where that start begins."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import bench_calibrated_start as bench
    from conftest_models import llama

    data = bench.Data(torch.randint(3, 50, (bench.LENGTH * (2 * bench.HELD_OUT + 8),)))
    options = SimpleNamespace(rank=4, method="static", steps=3, every=2, rows=2, lr=1e-3)
    rows = {}
    for start in ("plain", "calibrated"):
        wrapped = bench.build(start, llama(), data, options)
        first = {key: tensor.detach().clone() for key, tensor in wrapped.adapter_state_dict().items()}
        curves = {}
        for seed in (0, 0):
            bench.begin(wrapped, start, first, seed)
            curves.setdefault(str(seed), []).append(bench.train(wrapped, data, seed, options))
        assert curves["0"][0] == curves["0"][1]
        assert [step for step, _ in curves["0"][0]] == [0, 2, 3]
        rows[start] = {"start": start, "cpu_seconds": 1, "train_cpu_seconds": 2, "curves": {"0": curves["0"][0]}}
    last = rows["plain"]["curves"]["0"][-1][1]
    found = bench.measured(rows["plain"], rows["plain"], [0])
    assert found["last"] == last and found["steps"] == [bench.steps_to(rows["plain"]["curves"]["0"], last)]
    assert bench.table(list(rows.values()), [0]).splitlines()[3].startswith("| calibrated ")
    assert bench.steps_to([(0, 3.0), (2, 2.0), (3, 1.0)], 2.5) == 2
    assert bench.steps_to([(0, 3.0)], 2.5) is None


def test_bench_merge_judges_each_way(monkeypatch, capsys):
    """Its table is what users decide by whether to merge; one contender that fails would end a run of minutes."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import bench_merge as bench
    from conftest_models import llama, randomize

    from lowbit_lora import QLoRAConfig, QLoRAModel
    from lowbit_lora.recovery import mean_loss

    torch.manual_seed(0)
    model = QLoRAModel(llama(), QLoRAConfig(rank=4)).eval()
    randomize(model)
    ids = torch.randint(3, 50, (4, 16))
    batches = [{"input_ids": some, "labels": some} for some in ids.split(2)]
    case = bench.Case(model, lambda judged: {"loss": mean_loss(judged.eval(), batches)[0]}, batches)
    monkeypatch.setattr(bench, "dialogues", lambda options: case)
    options = {"task": "dialogues", "contenders": list(bench.CONTENDERS), "sweeps": 1}
    with_adapter = case.judge(model)["loss"]
    found = bench.rows(SimpleNamespace(**options, damping=None, shift=None, ridge=None))
    base, adapter, in_16_bits, *in_4_bits = found
    assert (base["recovery"], adapter["recovery"]) == (0.0, 1.0) and adapter["loss"] == with_adapter != base["loss"]
    assert abs(in_16_bits["recovery"] - 1) < 0.2
    assert [row["name"] for row in in_4_bits] == [bench.NAMES[how] for how in bench.CONTENDERS[1:]]
    assert {row["bytes"] for row in in_4_bits} == {base["bytes"]} and base["bytes"] < adapter["bytes"]
    assert case.judge(model)["loss"] == with_adapter
    lines = bench.markdown(found).splitlines()
    assert len(lines) == 2 + len(found)
    assert all("-" in rule for rule in lines[1].strip("| ").split("|"))  # Markdown has no table without
    assert capsys.readouterr().out.count("recovery") == len(found)

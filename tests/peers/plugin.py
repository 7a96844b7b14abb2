"""pytest plugin: runs the LoRA tests of PEFT's suite against lowbit_lora, and writes one JSON line for each.

Environment variables: PEER_REPORT names the file to write. PEER_BASELINE=1 leaves PEFT as it is, to learn which tests
PEFT itself fails here. PEER_BASE leaves it so too, and runs its tests of all methods: "dense" on the models that the
tests make, "quantized" on the same with weights that lowbit has quantized, "decoded" on such that are decoded before
they merge. ``rules.py`` says how a test is counted, ``shim.py`` puts lowbit_lora in PEFT's place, ``quantized.py``
quantizes.
"""

import inspect
import json
import os
import re
import time

import pytest
import rules

#: "dense", "quantized" or "decoded" where PEFT itself runs, with all of its methods.
BASE = os.environ.get("PEER_BASE")
BASELINE = os.environ.get("PEER_BASELINE") == "1" or BASE is not None

#: What the shim calls where lowbit comes in: a pass without any such call checks PEFT's own code only.
touched: list[str] = []

_started: dict[str, float] = {}


class FeatureMissing(Exception):
    """lowbit has nothing to map this onto."""

    raised: list[str] = []

    def __init__(self, feature: str):
        super().__init__(f"lowbit has no {feature}")
        FeatureMissing.raised.append(feature)


# ---- which tests run

_CONFIGS = re.compile(r"\b([A-Z]\w*?)Config\(")
#: Configs that a test of LoRA may name.
_PART_OF_LORA = {"Lora", "LoftQ", "Eva", "Corda", "Velora", "Kasa", "Monteclora", "Arrow", "LoraRuntime", "BdLora"}
_PART_OF_LORA |= {"LoraGA", "Megatron", "BitsAndBytes", "Auto", "GPT2", "OPT", "Llama", "Mock"}
#: Classes whose tests get their LoRA model from a fixture or helper.
_LORA_CLASSES = {
    "TestLoraInitialization",
    "TestCordaInitialization",
    "TestEvaInitialization",
    "TestHotSwapping",
    "TestScaling",
    "TestModelAndLayerStatus",
    "TestMixedAdapterBatches",
    "TestDynamicDispatch",
    "TestActivatedLora",
    "TestLoraVariants",
    "TestCheckIsPeftModel",
    "TestScalingAdapters",
}


def is_lora(item) -> bool:
    """Whether a test is of LoRA and of no other method: by its parameters, or else by the configs its source names."""
    from peft import LoraConfig, PeftConfig

    values = getattr(getattr(item, "callspec", None), "params", {}).values()
    flat = [v for value in values for v in (value if isinstance(value, (list, tuple)) else [value])]
    classes = [v for v in flat if inspect.isclass(v) and issubclass(v, PeftConfig)]
    classes += [type(v) for v in flat if isinstance(v, PeftConfig)]
    if classes:
        return all(cls is LoraConfig for cls in classes)
    try:
        source = inspect.getsource(item.function)
    except (OSError, TypeError):
        return False
    named = set(_CONFIGS.findall(source))
    known = item.cls is not None and item.cls.__name__ in _LORA_CLASSES
    return ("Lora" in named or known) and not named - _PART_OF_LORA


def method(item) -> str | None:
    """The method of PEFT's that a test of its grids is for."""
    params = getattr(getattr(item, "callspec", None), "params", {})
    cls = params.get("config_cls")
    return cls.__name__.removesuffix("Config") if inspect.isclass(cls) else None


def pytest_configure(config):
    if BASE in ("quantized", "decoded"):
        import quantized

        quantized.install(decode=BASE == "decoded")
    if not BASELINE:
        import shim

        shim.install()


def pytest_collection_modifyitems(config, items):
    drop = [item for item in items if not (method(item) if BASE else is_lora(item))]
    items[:] = [item for item in items if item not in set(drop)]
    config.hook.pytest_deselected(items=drop)


def pytest_collection_finish(session):
    # Every model they load lies in the cache that tiny_hub.py made: never ask the network.
    import tests.testing_utils as utils

    class Always(dict):
        def __contains__(self, key):
            return True

        def __missing__(self, key):
            return 1

    utils._HUB_MODEL_ACCESSES = Always()


# ---- how each is counted


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    FeatureMissing.raised.clear()
    touched.clear()
    _started[item.nodeid] = time.time()


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    outcome = yield
    report = outcome.get_result()
    if not (report.when == "call" or report.outcome != "passed"):
        return
    kind, detail = _plain_kind(report, call)
    raised = list(FeatureMissing.raised)
    if BASE in ("quantized", "decoded"):
        kind, detail = _kind_on_quantized(item.nodeid, kind, detail, report.longreprtext)
    if not BASELINE:
        kind, detail = _kind(item.nodeid, kind, detail, report.longreprtext, raised)
    if report.when != "call" and kind == "passed":
        return
    line = {
        "id": item.nodeid,
        "when": report.when,
        "kind": kind,
        "detail": detail,
        "feature": rules.feature(item),
        "layer": method(item) if BASE else rules.layer(item),
        "s": round(time.time() - _started.get(item.nodeid, time.time()), 3),
    }
    if kind == "fault?":
        line["trace"] = report.longreprtext[-3000:]
    with open(os.environ["PEER_REPORT"], "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def _plain_kind(report, call) -> tuple[str, str]:
    if getattr(report, "wasxfail", None) is not None:
        return ("xfailed" if report.outcome == "skipped" else "xpassed"), str(report.wasxfail)
    if report.outcome == "skipped":
        return "skipped", str(report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr)[:200]
    if report.outcome == "failed":
        return "failed", f"{type(call.excinfo.value).__name__}: {call.excinfo.value}"[:400]
    return "passed", ""


def _kind(nodeid: str, kind: str, detail: str, trace: str, raised: list[str]) -> tuple[str, str]:
    """What a test counts as, and why.

    Whatever the shim had nothing to map onto is missing, also where the test expects an error.
    """
    if raised and kind in ("failed", "xfailed", "passed", "xpassed"):
        return "missing", raised[0]
    if kind == "failed":
        for table, name in ((rules.EXPLAINED, "explained"), (rules.MISSING, "missing")):
            if why := _match(table, nodeid):
                return name, why
        if why := _match(rules.MISSING_TRACE, trace):
            return "missing", why
        return "fault?", detail
    if kind == "passed":
        if not touched or _match(rules.VACUOUS, nodeid):
            return "vacuous", _match(rules.VACUOUS, nodeid) or "no lowbit in it"
        if why := _match(rules.PROVIDER, nodeid):
            return "shim", why
    return kind, detail


def _kind_on_quantized(nodeid: str, kind: str, detail: str, trace: str) -> tuple[str, str]:
    if kind == "failed":
        if why := _match(rules.REFUSED_ON_QUANTIZED, trace):
            return "refused", why
        why = _match(rules.EXPLAINED_ON_QUANTIZED, nodeid)
        return ("explained", why) if why else ("fault?", detail)
    if kind == "passed" and not touched:
        return "vacuous", "no quantized weight in it"
    return kind, detail


def _match(table: dict[str, str], text: str) -> str | None:
    return next((why for pattern, why in table.items() if re.search(pattern, text)), None)

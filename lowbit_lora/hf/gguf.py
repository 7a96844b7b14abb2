"""GGUF: a model in the one file that llama.cpp, ollama and others run, written by the package ``gguf``.

Names and shapes are those of llama.cpp's own converter. It stores the rows of a Llama's queries and keys in another
order than transformers, because it rotates neighbouring elements where transformers rotates halves.
"""

import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from lowbit import QuantizedTensor
from lowbit.checks import check_choice
from lowbit.files.folder import written_beside

#: transformers' model_type -> GGUF's architecture.
ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2"}
#: How the weights of layers are stored -> (gguf's type, its number as the file's type). Norms and biases are in fp32.
STORED_AS = {"f32": ("F32", 0), "f16": ("F16", 1), "bf16": ("BF16", 32), "q8_0": ("Q8_0", 7), "q4_0": ("Q4_0", 2)}


def write(
    model: nn.Module, tokenizer: str | os.PathLike | None, path: str | os.PathLike, stored_as: str = "f16"
) -> int:
    """Write a causal language model to a GGUF file; returns its bytes.

    Args:
        model: one of transformers, dense or quantized by lowbit; quantized weights are decoded, one at a time.
        tokenizer: the folder of its tokenizer's files; None leaves the tokenizer out.
        path: of the file. It is written beside and renamed, so that an old one outlives an error.
        stored_as: a key of :data:`STORED_AS`.

    Raises:
        ValueError: an architecture, a setting or a tokenizer that is not mapped here.
        OSError: the file cannot be written.
        ImportError: gguf is not installed.
    """
    check_choice("stored_as", stored_as, STORED_AS)
    _check_model(model)
    vocabulary = None if tokenizer is None else _vocabulary(Path(tokenizer), model.config.vocab_size)
    try:
        import gguf
    except ImportError as error:
        raise ImportError("writing GGUF needs the package gguf: pip install 'lowbit[gguf]'") from error
    architecture = ARCHITECTURES[model.config.model_type]
    names = _names(model, gguf, architecture)
    folder, name = os.path.split(os.path.abspath(path))
    with written_beside(folder) as beside:
        writer = gguf.GGUFWriter(os.path.join(beside, name), architecture)
        try:
            _add_settings(writer, model, STORED_AS[stored_as][1])
            if vocabulary is not None:
                _add_vocabulary(writer, gguf, vocabulary, Path(tokenizer))
            _write_tensors(writer, gguf, model, names, STORED_AS[stored_as][0])
        finally:
            writer.close()
    return os.path.getsize(path)


def _check_model(model: nn.Module) -> None:
    config = model.config
    if config.model_type not in ARCHITECTURES:
        raise ValueError(
            f"model: expected one of {', '.join(ARCHITECTURES)} for GGUF, got {config.model_type!r}; llama.cpp's "
            "convert_hf_to_gguf.py knows more, and reads the folder that lowbit merge writes"
        )
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type", "default") != "default":
        raise ValueError(f"model: expected rotary embeddings as they are for GGUF, got rope_type={rope['rope_type']!r}")
    sliding = getattr(config, "sliding_window", None)
    if sliding is not None and getattr(config, "use_sliding_window", True):
        raise ValueError(f"model: expected attention to all tokens for GGUF, got sliding_window={sliding}")


def _names(model: nn.Module, gguf, architecture: str) -> dict[str, nn.Parameter]:
    """GGUF's name of each parameter.

    Raises:
        ValueError: gguf knows none.
    """
    kind = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    known = gguf.get_tensor_name_map(kind, model.config.num_hidden_layers)
    names = {}
    for name, parameter in model.named_parameters():
        mapped = known.get_name(name, try_suffixes=(".weight", ".bias"))
        if mapped is None:
            raise ValueError(f"model: expected parameters that GGUF's {architecture} has, got {name!r}")
        names[mapped] = parameter
    return names


def _add_settings(writer, model: nn.Module, file_type: int) -> None:
    config = model.config
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    writer.add_name(os.path.basename(os.path.normpath(config.name_or_path or config.model_type)))
    writer.add_file_type(file_type)
    writer.add_quantization_version(2)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(getattr(config, "num_key_value_heads", None) or heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)


def _write_tensors(writer, gguf, model: nn.Module, names: dict[str, nn.Parameter], stored_as: str) -> None:
    kinds = {name: _kind(gguf, parameter, stored_as) for name, parameter in names.items()}
    as_numpy = {gguf.GGMLQuantizationType.F32: np.float32, gguf.GGMLQuantizationType.F16: np.float16}
    for name, parameter in names.items():
        dtype, in_bytes = as_numpy.get(kinds[name]), gguf.quant_shape_to_byte_shape(parameter.shape, kinds[name])
        shape = in_bytes if dtype is None else parameter.shape
        writer.add_tensor_info(name, shape, np.dtype(dtype or np.uint8), math.prod(in_bytes), raw_dtype=kinds[name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, parameter in tqdm(names.items(), "Writing", leave=False, disable=None):
        values = parameter.detach()
        values = values.dequantize(torch.float32) if isinstance(values, QuantizedTensor) else values
        values = _in_their_order(name, values, model.config).float().cpu().contiguous()
        writer.write_tensor_data(gguf.quants.quantize(values.numpy(), kinds[name]))


def _kind(gguf, parameter: nn.Parameter, stored_as: str):
    """How a parameter is stored: vectors in fp32, and weights that blocks do not divide in fp16."""
    types = gguf.GGMLQuantizationType
    if parameter.dim() == 1:
        return types.F32
    kind = types[stored_as]
    return kind if parameter.shape[-1] % gguf.GGML_QUANT_SIZES[kind][0] == 0 else types.F16


def _in_their_order(name: str, values: torch.Tensor, config: Any) -> torch.Tensor:
    if ARCHITECTURES[config.model_type] != "llama" or not (".attn_q." in name or ".attn_k." in name):
        return values
    heads = config.num_attention_heads if ".attn_q." in name else config.num_key_value_heads
    halves = values.unflatten(0, (heads, 2, values.shape[0] // heads // 2))
    return halves.transpose(1, 2).reshape(values.shape)


def _vocabulary(folder: Path, size: int) -> dict[str, Any]:
    """The tokens by number, their types, and the name by which llama.cpp knows how text is split before.

    Raises:
        ValueError: no byte-level BPE, or one whose splitting is not known here.
        OSError: no tokenizer.json.
    """
    content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    if content["model"]["type"] != "BPE" or content["model"].get("byte_fallback"):
        raise ValueError("tokenizer: expected byte-level BPE for GGUF; --no-tokenizer writes the weights alone")
    texts = {number: text for text, number in content["model"]["vocab"].items()}
    types = dict.fromkeys(texts, "NORMAL")
    for token in content.get("added_tokens", ()):
        texts[token["id"]] = token["content"]
        types[token["id"]] = "CONTROL" if token["special"] else "USER_DEFINED"
    size = max(size, max(texts) + 1)  # models have rows that no token uses
    return {
        "tokens": [texts.get(number, f"[PAD{number}]") for number in range(size)],
        "types": [types.get(number, "UNUSED") for number in range(size)],
        "splitting": _splitting(content.get("pre_tokenizer")),
    }


def _splitting(pre_tokenizer: Any) -> str:
    text = json.dumps(pre_tokenizer)
    if "ByteLevel" in text:
        if "Split" not in text:
            return "smollm" if "Digits" in text else "gpt-2"
        if r"\\p{N}{1,3}" in text:
            return "llama-bpe"
        if r"\\p{N}" in text:
            return "qwen2"
    raise ValueError(
        "tokenizer: expected the splitting of GPT-2, SmolLM, Llama 3 or Qwen2 for GGUF, got another one; "
        "--no-tokenizer writes the weights alone"
    )


def _add_vocabulary(writer, gguf, vocabulary: dict[str, Any], folder: Path) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(vocabulary["splitting"])
    writer.add_token_list(vocabulary["tokens"])
    writer.add_token_types([gguf.TokenType[kind] for kind in vocabulary["types"]])
    gguf.SpecialVocab(folder, load_merges=True, n_vocab=len(vocabulary["tokens"])).add_to_gguf(writer, quiet=True)

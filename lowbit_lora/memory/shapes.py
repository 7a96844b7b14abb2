"""The configs of well-known models, by which their memory is estimated without their files."""

from typing import Any

_LLAMA = {"model_type": "llama", "tie_word_embeddings": False}
_BERT = {"max_position_embeddings": 512, "hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}


def _llama(hidden: int, layers: int, heads: int, mlp: int, vocabulary: int = 32000, kv: int | None = None) -> dict:
    return _LLAMA | {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv or heads,
        "head_dim": hidden // heads,
        "intermediate_size": mlp,
        "vocab_size": vocabulary,
    }


#: Name -> the entries of config.json that decide the memory.
SHAPES: dict[str, dict[str, Any]] = {
    "BERT 110M": _BERT
    | {
        "model_type": "bert",
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "intermediate_size": 3072,
        "vocab_size": 30522,
    },
    "RoBERTa 355M": _BERT
    | {
        "model_type": "roberta",
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "intermediate_size": 4096,
        "vocab_size": 50265,
        "max_position_embeddings": 514,
        "type_vocab_size": 1,
        "pad_token_id": 1,
    },
    # The shape of the bundled SmolLM2-135M-Instruct.
    "Llama 135M": _llama(576, 30, 9, 1536, 49152, kv=3) | {"tie_word_embeddings": True},
    "LLaMA 7B": _llama(4096, 32, 32, 11008),
    "LLaMA 13B": _llama(5120, 40, 40, 13824),
    "LLaMA 33B": _llama(6656, 60, 52, 17920),
    "LLaMA 65B": _llama(8192, 80, 64, 22016),
    "Llama 3 70B": _llama(8192, 80, 64, 28672, 128256, kv=8),
    "Llama 3 405B": _llama(16384, 126, 128, 53248, 128256, kv=8),
    "Mixtral 8x7B": _llama(4096, 32, 32, 14336, kv=8)
    | {"model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 2},
}

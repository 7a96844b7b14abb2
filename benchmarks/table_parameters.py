"""How many parameters LoRA trains in BERT base and in LLaMA 7B and 65B: counted, not measured.

python benchmarks/table_parameters.py --ranks 8 16

The models are built from configs on the meta device, without weights, memory or network. The count is that of the
wrapped model, so it is exact.
"""

import argparse
import sys

#: What the attention's query and value are called in each architecture.
QUERY_VALUE = {"bert": ["query", "value"], "llama": ["q_proj", "v_proj"]}
#: BERT's is base uncased with a head for two labels; LLaMA's sizes are those of Touvron et al., "LLaMA", 2023, table 2.
MODELS: dict[str, tuple[str, dict]] = {
    "BERT base": ("bert", {"num_labels": 2}),
    "LLaMA 7B": (
        "llama",
        {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "intermediate_size": 11008},
    ),
    "LLaMA 65B": (
        "llama",
        {"hidden_size": 8192, "num_hidden_layers": 80, "num_attention_heads": 64, "intermediate_size": 22016},
    ),
}


def build(name: str):
    """Return one of MODELS on the meta device."""
    import torch
    import transformers

    architecture, sizes = MODELS[name]
    with torch.device("meta"):
        if architecture == "bert":
            return transformers.BertForSequenceClassification(transformers.BertConfig(**sizes))
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, vocab_size=32000))


def count(name: str, targets: str | list[str], rank: int) -> dict:
    """Wrap a fresh model; return its trainable parameters: LoRA's, those of a head that trains whole, and all."""
    import torch

    from lowbit_lora import LoraConfig, LoraModel

    base = build(name)
    parameters = sum(parameter.numel() for parameter in base.parameters())
    with torch.device("meta"):
        model = LoraModel(base, LoraConfig(rank=rank, target_modules=targets))
    trainable = {key: p.numel() for key, p in model.named_parameters() if p.requires_grad}
    lora = sum(numel for key, numel in trainable.items() if ".lora_" in key)
    return {
        "model": name,
        "parameters": parameters,
        "targets": "all-linear" if targets == "all-linear" else ", ".join(targets),
        "rank": rank,
        "lora": lora,
        "head": sum(trainable.values()) - lora,
        "trainable": sum(trainable.values()),
        "share": sum(trainable.values()) / parameters,
    }


def rows(models: list[str], ranks: list[int]) -> list[dict]:
    """Return one dict for each model, choice of layers and rank, with a progress bar."""
    from tqdm import tqdm

    cases = [
        (name, targets, rank)
        for name in models
        for targets in (QUERY_VALUE[MODELS[name][0]], "all-linear")
        for rank in ranks
    ]
    return [count(*case) for case in tqdm(cases, unit="model", disable=None)]


def print_table(console, rows: list[dict]) -> None:
    """Print the rows."""
    from rich.table import Table

    titles = ("model", "parameters", "layers with LoRA", "r", "LoRA", "head", "trainable", "share")
    table = Table(*titles, title="trainable parameters")
    for row in rows:
        numbers = [f"{row[key]:,}" for key in ("lora", "head", "trainable")]
        table.add_row(
            row["model"], f"{row['parameters']:,}", row["targets"], str(row["rank"]), *numbers, f"{row['share']:.3%}"
        )
    console.print(table)


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=[*MODELS], choices=MODELS)
    parser.add_argument("--ranks", nargs="+", type=int, default=[8, 16])
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args(argv)
    if any(rank < 1 for rank in options.ranks):
        parser.error(f"--ranks: expected numbers of at least 1, got {options.ranks}")
    return options


def main(argv: list[str] | None = None) -> int:
    options = arguments(argv)
    from report import write_json
    from rich.console import Console

    found = rows(options.models, options.ranks)
    print_table(Console(width=120), found)
    if options.json:
        write_json(options.json, {"rows": found})
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""``lowbit generate``: what a model answers."""

import sys
import time
from typing import Annotated

import torch
import typer

from .models import load, with_adapter
from .output import Json, report


def add_to(app: typer.Typer) -> None:
    app.command(epilog='Example: lowbit generate ./my-model-nf4 --prompt "What is a llama?" --adapter ./adapter')(
        generate
    )


def generate(
    model: Annotated[str, typer.Argument(help="Folder or hub name of a causal language model.")],
    prompt: Annotated[str, typer.Option(help="What to answer, or with --raw to go on with; - reads stdin.")],
    adapter: Annotated[str | None, typer.Option(help="Folder or hub name of an adapter.")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Do not put the prompt into the chat template.")] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="The most tokens to make.")] = 128,
    temperature: Annotated[float, typer.Option(min=0, help="Of sampling; 0 takes the likeliest token.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of sampling.")] = 0,
    device: Annotated[str | None, typer.Option(help="cpu, cuda...; by default a GPU if there is one.")] = None,
    json: Json = False,
) -> None:
    """Print what a model makes of a prompt; as a chat where its tokenizer has a template."""
    from transformers import AutoTokenizer, TextStreamer

    base = load(model)
    tokenizer = AutoTokenizer.from_pretrained(model)
    if not base.can_generate():
        raise ValueError(f"MODEL: expected a model that generates text, got {type(base).__name__}")
    runs = (base if adapter is None else with_adapter(base, adapter)).to(_device(device)).eval()
    text = sys.stdin.read() if prompt == "-" else prompt
    if tokenizer.chat_template and not raw:
        messages = [{"role": "user", "content": text}]
        inputs = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
    else:
        inputs = tokenizer(text, return_tensors="pt")
    inputs = inputs.to(_device(device))
    options = {"do_sample": temperature > 0, "max_new_tokens": max_new_tokens}
    if temperature > 0:
        options["temperature"] = temperature
    if tokenizer.pad_token_id is not None:
        options["pad_token_id"] = tokenizer.pad_token_id
    if not json:
        options["streamer"] = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    torch.manual_seed(seed)
    started = time.perf_counter()
    with torch.no_grad():
        made = runs.generate(**inputs, **options)[0, inputs["input_ids"].shape[1] :]
    if json:
        seconds = time.perf_counter() - started
        answer = tokenizer.decode(made, skip_special_tokens=True)
        report({"prompt": text, "text": answer, "tokens": len(made), "seconds": seconds}, True)


def _device(name: str | None) -> str:
    return name or ("cuda" if torch.cuda.is_available() else "cpu")

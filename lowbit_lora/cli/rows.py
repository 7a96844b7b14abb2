"""Rows of training data: from files and the hub, and as tokens with labels.

JSONL and CSV are read here; parquet files and data sets of the hub by the library ``datasets``.
"""

import csv
import json
import os
import random
from collections.abc import Callable, Iterable
from typing import Any

#: What the loss ignores.
IGNORED = -100

Row = dict[str, Any]


def read(source: str, split: str = "train") -> list[Row]:
    """The rows of a file (.jsonl, .csv, .tsv, .parquet), or of a data set of the hub ("owner/name", "owner/name:part").

    A .txt file is one row, whose column is "text".

    Raises:
        OSError: there is no such file.
        ValueError: a line that is no JSON object (it is named), another kind of file, no rows.
        ImportError: ``datasets`` is needed and not installed.
    """
    kind = os.path.splitext(source)[1].lower()
    if kind in (".jsonl", ".json"):
        rows = _read_jsonl(source)
    elif kind in (".csv", ".tsv"):
        with open(source, encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file, delimiter="\t" if kind == ".tsv" else ","))
    elif kind == ".txt":
        with open(source, encoding="utf-8") as file:
            text = file.read()
        rows = [{"text": text}] if text.strip() else []
    elif os.path.exists(source) and kind != ".parquet":
        raise ValueError(f"data: expected a .jsonl, .csv, .tsv, .txt or .parquet file, got {source}")
    else:
        rows = _read_by_datasets(source, split, kind)
    if not rows:
        raise ValueError(f"data: expected rows, got none in {source}")
    return rows


def _read_jsonl(path: str) -> list[Row]:
    with open(path, encoding="utf-8") as file:
        text = file.read()
    if text.lstrip().startswith("["):  # one list of rows
        rows = json.loads(text)
        places = [f"{path}, row {index}" for index in range(1, len(rows) + 1)]
    else:
        lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
        places = [f"{path}, line {number}" for number, _ in lines]
        rows = []
        for place, (_, line) in zip(places, lines, strict=True):
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise ValueError(f"{place}: expected a JSON object ({error})") from error
    for place, row in zip(places, rows, strict=True):
        if not isinstance(row, dict):
            raise ValueError(f"{place}: expected a JSON object, got {type(row).__name__}")
    return rows


def _read_by_datasets(source: str, split: str, kind: str) -> list[Row]:
    try:
        import datasets
    except ImportError as error:
        raise ImportError(
            f"{source}: parquet files and data sets of the hub need the package datasets: pip install 'lowbit[data]'"
        ) from error
    if kind == ".parquet":
        return list(datasets.load_dataset("parquet", data_files=source, split="train"))
    name, _, subset = source.partition(":")
    return list(datasets.load_dataset(name, subset or None, split=split))


def task_of(rows: list[Row], text_column: str, label_column: str) -> str:
    """What the columns are for: "chat", "classification" or "causal-lm".

    Raises:
        ValueError: none of them.
    """
    columns = rows[0].keys()
    if "messages" in columns:
        return "chat"
    if text_column in columns:
        return "classification" if label_column in columns else "causal-lm"
    raise ValueError(
        f"data: expected a column 'messages', or {text_column!r} (and {label_column!r}), got {', '.join(columns)}"
    )


def column(rows: list[Row], name: str) -> list[Any]:
    """The values of a column.

    Raises:
        ValueError: a row without one; it is numbered.
    """
    for number, row in enumerate(rows, 1):
        if row.get(name) is None:
            raise ValueError(f"data: expected {name!r} in each row, row {number} has {', '.join(row)}")
    return [row[name] for row in rows]


def labels(rows: list[Row], name: str) -> list[str]:
    """The labels of a classification, sorted.

    Raises:
        ValueError: fewer than two.
    """
    found = sorted({str(value) for value in column(rows, name)})
    if len(found) < 2:
        raise ValueError(f"data: expected at least two labels in {name!r}, got {', '.join(found)}")
    return found


def texts(rows: list[Row], tokenizer: Any, name: str, length: int) -> list[Row]:
    """Texts as tokens, each its own label; longer ones go on in a row of their own."""
    ended = [[*ids, tokenizer.eos_token_id] for ids in tokenizer(column(rows, name)).input_ids]
    pieces = [ids[at : at + length] for ids in ended for at in range(0, len(ids), length)]
    return [{"input_ids": ids, "labels": list(ids)} for ids in pieces if len(ids) > 1]


def classified(rows: list[Row], tokenizer: Any, name: str, label: str, labels: list[str], length: int) -> list[Row]:
    """Texts as tokens, cut off after ``length``, with the number of their label."""
    encoded = tokenizer(column(rows, name), truncation=True, max_length=length)
    numbers = {text: number for number, text in enumerate(labels)}
    found = [str(value) for value in column(rows, label)]
    unknown = sorted(set(found) - numbers.keys())
    if unknown:
        raise ValueError(f"data: expected labels among {', '.join(labels)}, got {', '.join(unknown)}")
    inputs = [dict(zip(encoded, values, strict=True)) for values in zip(*encoded.values(), strict=True)]
    return [row | {"labels": numbers[text]} for row, text in zip(inputs, found, strict=True)]


def chats(rows: list[Row], tokenizer: Any, length: int, assistant_only: bool) -> list[Row]:
    """Conversations as tokens by the tokenizer's chat template, cut off after ``length``.

    Args:
        assistant_only: only what the assistant says has labels.

    Raises:
        ValueError: no chat template; one by which a longer conversation does not begin as a shorter one does, so that
            it cannot be seen what the assistant says; a row that is no conversation.
    """
    if not tokenizer.chat_template:
        raise ValueError("data: expected a tokenizer with a chat template for conversations, this one has none")
    made = []
    for number, messages in enumerate(column(rows, "messages"), 1):
        if not isinstance(messages, list) or not all(isinstance(m, dict) and "role" in m for m in messages):
            raise ValueError(f"data: expected a list of {{role, content}} as 'messages', row {number} has {messages!r}")
        ids, labels = _conversation(messages, tokenizer, assistant_only, number)
        if any(label != IGNORED for label in labels[1:length]):  # the first token is nobody's next
            made.append({"input_ids": ids[:length], "labels": labels[:length]})
    if not made:
        raise ValueError(f"data: expected something that the assistant says within max_length={length} tokens")
    return made


def _conversation(messages: list[Row], tokenizer: Any, assistant_only: bool, number: int) -> tuple[list, list]:
    def encode(some: list[Row], **options: Any) -> Any:
        return tokenizer.apply_chat_template(some, return_dict=True, **options)

    if not assistant_only:
        ids = list(encode(messages)["input_ids"])
        return ids, list(ids)
    if "{% generation" in tokenizer.chat_template or "{%- generation" in tokenizer.chat_template:
        whole = encode(messages, return_assistant_tokens_mask=True)
        ids, said = list(whole["input_ids"]), whole["assistant_masks"]
        return ids, [token if own else IGNORED for token, own in zip(ids, said, strict=True)]
    ids = list(encode(messages)["input_ids"])
    labels = [IGNORED] * len(ids)
    for turn, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = list(encode(messages[:turn], add_generation_prompt=True)["input_ids"])
        after = list(encode(messages[: turn + 1])["input_ids"])
        if ids[: len(before)] != before or ids[: len(after)] != after:
            raise ValueError(
                f"data: expected a chat template that only adds to a conversation, row {number} begins differently "
                f"once message {turn + 2} is there; use --loss-on all, or a template with a generation block"
            )
        labels[len(before) : len(after)] = ids[len(before) : len(after)]
    return ids, labels


def encoded(
    rows: list[Row],
    task: str,
    tokenizer: Any,
    text_column: str,
    label_column: str,
    labels: list[str] | None,
    length: int,
    assistant_only: bool,
) -> list[Row]:
    """Rows as tokens with labels, for a task that :func:`task_of` names; ``labels`` are those of a classification."""
    if task == "classification":
        return classified(rows, tokenizer, text_column, label_column, labels, length)
    if task == "chat":
        return chats(rows, tokenizer, length, assistant_only)
    return texts(rows, tokenizer, text_column, length)


def split(rows: list[Row], share: float, seed: int) -> tuple[list[Row], list[Row]]:
    """Rows to train on, and a share of them, chosen by the seed, to evaluate with."""
    count = round(share * len(rows))
    if not 0 < count < len(rows):
        raise ValueError(f"eval_share: expected rows on both sides, got {count} of {len(rows)} with {share}")
    order = random.Random(seed).sample(range(len(rows)), len(rows))
    return [rows[i] for i in sorted(order[count:])], [rows[i] for i in sorted(order[:count])]


def padded(pad: int) -> Callable[[Iterable[Row]], Row]:
    """A collator: rows padded on the right to the longest, with an attention mask."""
    import torch

    def collate(rows: Iterable[Row]) -> Row:
        rows = list(rows)
        longest = max(len(row["input_ids"]) for row in rows)

        def fill(values: list[int], filler: int) -> list[int]:
            return [*values, *[filler] * (longest - len(values))]

        batch = {"attention_mask": [fill([1] * len(row["input_ids"]), 0) for row in rows]}
        for key in rows[0]:
            filler = {"input_ids": pad, "labels": IGNORED}.get(key, 0)
            values = [row[key] for row in rows]
            batch[key] = [fill(v, filler) for v in values] if isinstance(values[0], list) else values
        return {key: torch.tensor(values) for key, values in batch.items()}

    return collate

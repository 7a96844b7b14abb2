"""Dialogues for the example on language models: finding, splitting, tokenizing and batching them.

A dialogue is a list of messages {"role", "content"}, as chat templates take it. Three sources give them: the dialogues
that travel inside the package chitchat-dataset, a local jsonl file and a Hugging Face hub data set, both with the
column `messages`. Nothing here knows about models or training.
"""

import importlib.util
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from classifier_data import SPLIT_SEED, DataError, check_columns, import_datasets, load_hub_splits

BUNDLED = "chitchat"
TEST_DIALOGUES = 500
#: What no loss is taken of: torch's and transformers' own number for it.
IGNORED = -100

_PACKAGE, _FILE = "chitchat_dataset", "dataset.json"
_COLUMN = "messages"

Message = dict[str, str]
Dialogue = list[Message]


@dataclass(frozen=True)
class Dialogues:
    """Dialogues, shuffled and split once."""

    train: list[Dialogue]
    test: list[Dialogue]

    def limited(self, train_size: int | None, test_size: int | None) -> "Dialogues":
        """Return the first of each part. The split is shuffled, so these are a fair sample."""
        return Dialogues(self.train[:train_size], self.test[:test_size])


def load(source: str) -> Dialogues:
    """Return the bundled dialogues ("chitchat"), those of a jsonl file, or those of a hub data set."""
    if source == BUNDLED:
        return _split(source, chitchat(bundled_file()))
    if Path(source).is_file():
        return _split(source, _read_jsonl(Path(source)))
    splits = load_hub_splits(source)
    check_columns(source, splits["train"], {"--dataset": _COLUMN})
    train = [_checked(source, n, row) for n, row in enumerate(splits["train"], start=1)]
    if "test" not in splits:
        return _split(source, train)
    return Dialogues(train, [_checked(source, n, row) for n, row in enumerate(splits["test"], start=1)])


def check_source(source: str) -> None:
    """Raise `DataError` if `load` is bound to fail, without reading the data."""
    if source == BUNDLED:
        bundled_file()
    elif source.endswith(".jsonl"):
        if not Path(source).is_file():
            raise DataError(f"--dataset: no such file: {source}")
    elif source.startswith((".", "/", "~")) or Path(source).exists():
        raise DataError(f"--dataset: expected a .jsonl file or the name of a hub data set, got {source}")
    else:
        import_datasets(source)


def bundled_file() -> Path:
    """Return the path of the bundled dialogues. Their package is found, not imported."""
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise DataError(
            "--dataset: the bundled dialogues are not installed; run `make demo-lm`, or "
            "`pip install --no-deps chitchat-dataset==0.9.0`"
        )
    return Path(spec.submodule_search_locations[0]) / _FILE


def chitchat(path: Path) -> list[Dialogue]:
    """Return the dialogues of two people who both wrote something: who begins is the user, who answers the assistant.

    A turn there is a list of messages that one of them sent in a row.
    """
    found = []
    for entry in json.loads(path.read_text(encoding="utf-8")).values():
        turns = ["\n".join(part["text"].strip() for part in turn) for turn in entry["messages"]]
        if len(turns) >= 2 and all(turns):
            roles = ("user", "assistant")
            found.append([{"role": roles[i % 2], "content": turn} for i, turn in enumerate(turns)])
    return found


def _read_jsonl(path: Path) -> list[Dialogue]:
    found = []
    with open(path, encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                try:
                    row = json.loads(line)
                except json.JSONDecodeError as error:
                    raise DataError(f"{path}, line {number}: expected a JSON object: {error}") from error
                found.append(_checked(path, number, row))
    return found


def _checked(source: object, number: int, row: object) -> Dialogue:
    """Return the messages of a row, with the keys that are needed and no other."""
    messages = row.get(_COLUMN) if isinstance(row, dict) else None
    try:
        dialogue = [{"role": m["role"], "content": m["content"]} for m in messages]
        is_text = all(isinstance(value, str) for m in dialogue for value in m.values())
    except (TypeError, KeyError):
        is_text = False
    if not is_text or not any(m["role"] == "assistant" for m in dialogue):
        raise DataError(
            f'{source}, row {number}: expected {{"{_COLUMN}": [{{"role": "user", "content": "..."}}, '
            f'{{"role": "assistant", "content": "..."}}, ...]}}, got {str(row)[:80]}'
        )
    return dialogue


def _split(source: str, dialogues: list[Dialogue]) -> Dialogues:
    if len(dialogues) < 2:
        raise DataError(f"{source}: expected at least two dialogues, got {len(dialogues)}")
    random.Random(SPLIT_SEED).shuffle(dialogues)
    cut = min(TEST_DIALOGUES, max(1, len(dialogues) // 5))
    return Dialogues(dialogues[cut:], dialogues[:cut])


class TokenizedDialogues(torch.utils.data.Dataset):
    """Dialogues as rows of `input_ids` and `labels`, both int64 [tokens]; the labels are of the assistant's words only.

    A dialogue is cut after `max_length` tokens; one whose assistant says nothing before that is left out.
    """

    def __init__(self, tokenizer, dialogues: Sequence[Dialogue], max_length: int):
        self._pad = tokenizer.pad_token_id
        rows = (_row(tokenizer, dialogue, max_length) for dialogue in dialogues)
        self.rows = [row for row in rows if (row["labels"] != IGNORED).any()]
        if not self.rows:
            raise DataError(f"--max-length: no assistant says anything in the first {max_length} tokens of a dialogue")

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return self.rows[index]

    def batch(self, rows: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """Return rows as one batch, padded on the right to the longest of them: int64 [rows, tokens] each."""
        ids, labels = (torch.nn.utils.rnn.pad_sequence(
            [row[name] for row in rows], batch_first=True, padding_value=value
        ) for name, value in (("input_ids", self._pad), ("labels", IGNORED)))  # fmt: skip
        lengths = torch.tensor([len(row["labels"]) for row in rows])
        mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def _row(tokenizer, dialogue: Dialogue, max_length: int) -> dict[str, torch.Tensor]:
    def rendered(messages: Dialogue, **options) -> str:
        return tokenizer.apply_chat_template(messages, tokenize=False, **options)

    text, spans = rendered(dialogue), []
    for place, message in enumerate(dialogue):
        if message["role"] == "assistant":
            before = rendered(dialogue[:place], add_generation_prompt=True)
            so_far = rendered(dialogue[: place + 1])
            if not (text.startswith(so_far) and so_far.startswith(before)):
                raise DataError("--model: its chat template writes a message otherwise once another follows")
            # What follows the last mark of an answer is between the messages: a line's end in most templates.
            spans.append((len(before), len(so_far.rstrip())))
    # The template wrote every special token.
    encoded = tokenizer(
        text, add_special_tokens=False, truncation=True, max_length=max_length, return_offsets_mapping=True
    )
    ids = torch.tensor(encoded["input_ids"])
    is_said = [any(a <= start < b for a, b in spans) for start, _ in encoded["offset_mapping"]]
    return {"input_ids": ids, "labels": torch.where(torch.tensor(is_said), ids, IGNORED)}

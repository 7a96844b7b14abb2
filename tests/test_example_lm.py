"""The example on language models, run as a user runs it, on a tiny model and a few dialogues."""

import json
import sys
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")
for _name in ("accelerate", "matplotlib", "peft", "rich"):
    pytest.importorskip(_name)

EXAMPLE = "train_qlora_causal_lm"
EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
WORDS = ["<pad>", "<end>", "<user>", "<assistant>", *(f"w{i}" for i in range(28))]
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }} <end>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)


def tokenizer(template: str | None = TEMPLATE):
    words = tokenizers.models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<pad>")
    made = tokenizers.Tokenizer(words)
    made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<end>")
    fast.chat_template = template
    return fast


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    """A random Llama of two layers, with a tokenizer of the words used here and no token for padding."""
    folder = tmp_path_factory.mktemp("model")
    config = transformers.LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=128,
        initializer_range=0.2,  # a frozen head of 0.02 would allow no certainty
        bos_token_id=None,
        eos_token_id=1,
    )
    transformers.set_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def dialogue(i: int) -> list[dict[str, str]]:
    """Somebody says a word, and the answer is the three that follow it; twice."""
    spoken = []
    for first in (i % 28, (i * 3) % 28):
        answer = " ".join(f"w{(first + k) % 28}" for k in (1, 2, 3))
        spoken += [{"role": "user", "content": f"w{first}"}, {"role": "assistant", "content": answer}]
    return spoken


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "chats.jsonl"
    rows = [json.dumps({"messages": dialogue(i), "id": i}) for i in range(60)]
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def arguments(model_folder, chats, tmp_path):
    return [
        *("--model", str(model_folder), "--dataset", str(chats), "--output", str(tmp_path / "out")),
        *("--epochs", "4", "--batch-size", "8", "--accumulate", "2", "--rank", "4", "--max-length", "32"),
    ]


@pytest.mark.parametrize("method", ["qlora", "lora"])
def test_run_writes_everything(example, arguments, tmp_path, method, capsys):
    """The demo would fail, not train, or report something else than it did."""
    options = ["--gradient-checkpointing"] if method == "lora" else []
    assert example.main([*arguments, "--method", method, "--lr", "3e-2", *options]) == 0
    out = tmp_path / "out"
    assert (out / "adapter" / "adapter_model.safetensors").is_file()
    assert (out / "training.png").read_bytes().startswith(b"\x89PNG")
    results = json.loads((out / "results.json").read_text(encoding="utf-8"))
    assert (results["train_dialogues"], results["test_dialogues"]) == (48, 12)
    assert results["test_reply_tokens"] == 12 * 2 * 4
    assert len(results["losses"]) == 4 * 3
    assert results["perplexity_before"] > 20 and results["perplexity_after"] < 0.6 * results["perplexity_before"]
    assert results["losses"][-1] < 0.8 * results["losses"][0]
    assert 0 < results["trainable_parameters"] < results["base_parameters"]
    assert results["reload_max_logit_difference"] == 0
    assert (results["quantized_bytes"] > 0) == (method == "qlora")
    assert [set(sample) for sample in results["samples"]] == [{"prompt", "before", "after", "human"}] * 3
    printed = capsys.readouterr().out
    for line in ("perplexity of held-out replies before", "perplexity of held-out replies after", "trainable param"):
        assert line in printed


def test_the_loss_is_of_replies_only(example):
    """The model would learn to write the user's words, the marks of a template, or no end of its own reply."""
    dialogues = sys.modules["dialogue_data"].TokenizedDialogues(tokenizer(), [dialogue(5), dialogue(5)[:2]], 32)
    words = ["<pad>" if id < 0 else WORDS[id] for id in dialogues[0]["labels"].tolist()]
    assert " ".join(words) == "<pad> <pad> <pad> <pad> w6 w7 w8 <end> <pad> <pad> <pad> <pad> w16 w17 w18 <end>"
    assert WORDS[dialogues[0]["input_ids"][1]] == "w5"


def test_rows_are_padded_and_cut(example):
    """Padding would count as text, or a long dialogue take more memory than was asked for."""
    made = tokenizer()
    made.pad_token = "<pad>"
    dialogues = sys.modules["dialogue_data"].TokenizedDialogues(made, [dialogue(1), dialogue(2)[:2]], 12)
    batch = dialogues.batch([dialogues[0], dialogues[1]])
    assert [tuple(tensor.shape) for tensor in batch.values()] == [(2, 12)] * 3
    assert batch["attention_mask"].tolist() == [[1] * 12, [1] * 8 + [0] * 4]
    assert (batch["labels"][1, 8:] == -100).all() and (batch["input_ids"][1, 8:] == 0).all()


def test_perplexity_is_of_every_reply_token(example, model_folder, arguments):
    """Batches of other lengths would weigh otherwise, and the figure depend on the batch size."""
    options = example.parse_options(arguments)
    model = transformers.AutoModelForCausalLM.from_pretrained(model_folder)
    made = example.load_tokenizer(str(model_folder))
    rows = sys.modules["dialogue_data"].TokenizedDialogues(made, [dialogue(1), dialogue(2)[:2], dialogue(3)], 32)
    losses = []
    for row in rows.rows:
        log_p = model(row["input_ids"][None]).logits[0].log_softmax(-1)
        losses += [-log_p[i - 1, id] for i, id in enumerate(row["labels"].tolist()) if id >= 0]
    expected = torch.stack(losses).mean().exp().item()
    for batch_size in (1, 2, 8):
        options.batch_size = batch_size
        assert example.perplexity(model, rows, options) == pytest.approx(expected, rel=1e-5)


def test_a_template_that_rewrites_what_came_before_is_refused(example):
    """Other words than the assistant's would silently count."""
    last_only = (
        "{% for m in messages %}{% if loop.last %}<{{ m['role'] }}> {{ m['content'] }} <end>\n{% endif %}{% endfor %}"
    )
    with pytest.raises(sys.modules["classifier_data"].DataError, match="--model.*template"):
        sys.modules["dialogue_data"].TokenizedDialogues(tokenizer(last_only), [dialogue(1)], 32)


def test_bundled_dialogues(example, tmp_path, monkeypatch):
    """Messages that one person sends in a row would be turns of both, or an empty one be trained on."""
    found = {
        "a": {"messages": [[{"text": "Hi "}, {"text": "you"}], [{"text": "Oh."}], [{"text": "Bye"}]]},
        "b": {"messages": [[{"text": "alone"}]]},
        "c": {"messages": [[{"text": "Well?"}], [{"text": " "}]]},
        "d": {"messages": [[{"text": "Yes"}], [{"text": "No"}]]},
    }
    (tmp_path / "chitchat_dataset").mkdir()
    (tmp_path / "chitchat_dataset" / "__init__.py").write_text("raise ImportError")
    (tmp_path / "chitchat_dataset" / "dataset.json").write_text(json.dumps(found), encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    data = sys.modules["dialogue_data"].load("chitchat")
    whole = sorted(data.train + data.test, key=len)
    assert [[(m["role"], m["content"]) for m in messages] for messages in whole] == [
        [("user", "Yes"), ("assistant", "No")],
        [("user", "Hi\nyou"), ("assistant", "Oh."), ("user", "Bye")],
    ]


@pytest.mark.parametrize(
    ("bad", "expected"),
    [
        (["--rank", "0"], "--rank"),
        (["--accumulate", "0"], "--accumulate"),
        (["--max-length", "2"], "--max-length"),
        (["--method", "full"], "--method"),
        (["--device", "nowhere"], "--device"),
        (["--model", "./no-such-model"], "no-such-model"),
        (["--dataset", "./no-such-file.jsonl"], "no-such-file.jsonl"),
        (["--dataset", str(EXAMPLES)], ".jsonl"),
    ],
)
def test_bad_options_stop_before_any_work(assert_stops_at_once, arguments, bad, expected):
    """A typing error would cost minutes, or end in a traceback."""
    assert_stops_at_once([*arguments, *bad], expected)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "two dialogues"),
        ("{]\n", "line 1"),
        ('{"messages": [{"role": "user", "content": "alone"}]}\n', "row 1"),
        ('{"messages": [{"role": "user"}]}\n', "row 1"),
        ('{"text": "no dialogue"}\n', "row 1"),
    ],
)
def test_bad_files(example, arguments, tmp_path, text, expected, capsys):
    """A wrong file would end in a traceback that does not name the row."""
    path = tmp_path / "bad.jsonl"
    path.write_text(text, encoding="utf-8")
    assert example.main([*arguments, "--dataset", str(path)]) == 2
    assert expected in capsys.readouterr().err


def test_a_model_without_a_chat_template(example, arguments, model_folder, capsys):
    """A base model would end in jinja's traceback, after it was loaded."""
    path = model_folder / "chat_template.jinja"
    text = path.read_text(encoding="utf-8")
    path.unlink()
    try:
        assert example.main(arguments) == 2
    finally:
        path.write_text(text, encoding="utf-8")
    assert "chat template" in capsys.readouterr().err

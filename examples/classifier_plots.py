"""The picture of one training run: loss per step and held-out accuracy per epoch."""

import matplotlib

matplotlib.use("Agg")  # draws into files; needs no display
import matplotlib.pyplot as plt  # noqa: E402  (the backend must be chosen first)

METHOD_NAMES = {"full": "Full fine-tuning", "lora": "LoRA", "qlora": "QLoRA"}


def plot_history(
    path, losses: list[float], accuracy: list[tuple[int, float]], title: str, probe: float | None = None
) -> None:
    """Write a PNG: the loss of every step with its running mean, and accuracy on the test rows.

    With `probe` the accuracy of the linear probe is a line beside it.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), constrained_layout=True)
    steps = range(1, len(losses) + 1)
    left.plot(steps, losses, color="tab:blue", alpha=0.25, linewidth=0.8, label="each step")
    window = max(1, len(losses) // 20)
    left.plot(steps, running_mean(losses, window), color="tab:blue", label=f"mean of {window} steps")
    left.set(xlabel="step", ylabel="training loss (cross-entropy)", ylim=(0, None))
    left.legend()
    right.plot(*zip(*accuracy, strict=True), marker="o", color="tab:green")
    for step, value in accuracy:
        right.annotate(f"{value:.3f}", (step, value), textcoords="offset points", xytext=(0, 8), ha="center")
    if probe is not None:
        right.axhline(probe, color="tab:gray", linestyle="--", label=f"linear probe {probe:.3f}")
        right.legend(loc="lower right")
    right.set(xlabel="step", ylabel="test accuracy")
    right.margins(0.1, 0.2)
    figure.suptitle(title)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def running_mean(values: list[float], window: int) -> list[float]:
    """Return the mean of the last `window` values up to each place (fewer at the start)."""
    means = []
    for end in range(1, len(values) + 1):
        part = values[max(0, end - window) : end]
        means.append(sum(part) / len(part))
    return means

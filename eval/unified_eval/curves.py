"""Training curves: loss against cost, with the stages of the patch schedule marked."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from unified.files import write_whole

STAGE_COLORS = ("#e3eef9", "#fdf1dc", "#e6f4e6", "#f6e7f2")


def plot_loss(log: Sequence[Mapping[str, Any]], out: Path, title: str, codebook_size: int) -> Path:
    """Plot a training log against the backbone positions processed.

    Args:
        log: records with ``positions``, and either ``image_loss`` and ``patch_size``, or ``validation_loss`` and
            ``train_subset_loss``; losses in nats a code.
        out: PNG to write.
        title: headline.
        codebook_size: K; ``ln K``, the loss of a uniform guess, is a dotted line.

    Returns:
        ``out``.

    Raises:
        ValueError: if the log holds no training record.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import numpy as np

    training = [record for record in log if "image_loss" in record]
    if not training:
        raise ValueError("log: no record with an image_loss; train first.")
    checks = [record for record in log if "validation_loss" in record]
    figure, axes = plt.subplots(figsize=(9, 4.8), dpi=120)
    cost = np.array([record["positions"] for record in training]) / 1e6
    sizes = [record["patch_size"] for record in training]
    starts = [i for i in range(len(sizes)) if i == 0 or sizes[i] != sizes[i - 1]]
    edges = [0.0, *(cost[i - 1] for i in starts[1:]), cost[-1]]
    for number, index in enumerate(starts):
        left, right = edges[number], edges[number + 1]
        axes.axvspan(left, right, color=STAGE_COLORS[number % len(STAGE_COLORS)], lw=0)
        size = sizes[index]
        label = f"p = {size}" if right - left > 0.08 * cost[-1] else f"p={size}"
        axes.text(
            (left + right) / 2, 0.97, label, ha="center", va="top", transform=axes.get_xaxis_transform(), color="#445"
        )
    axes.plot(
        cost, [record["image_loss"] for record in training], color="#0b6e6e", lw=1.4, label="training, at the stage's p"
    )
    if checks:
        at = [record["positions"] / 1e6 for record in checks]
        for name, style, color, label in (
            ("train_subset_loss", "o-", "#c2571a", "training captions, p = 1"),
            ("validation_loss", "s--", "#6b4ba3", "held-out captions, p = 1"),
        ):
            axes.plot(at, [record[name] for record in checks], style, color=color, lw=1, ms=4, label=label)
    axes.axhline(np.log(codebook_size), color="#888", lw=0.8, ls=":", label=f"uniform over {codebook_size} codes")
    axes.set(
        xlabel="cost: backbone positions processed (millions)",
        ylabel="image loss (nats a code)",
        title=title,
        xlim=(0, cost[-1]),
    )
    axes.set_ylim(top=np.log(codebook_size) + 0.6)
    axes.legend(frameon=False, loc="lower left", fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    write_whole(out, lambda beside: figure.savefig(beside, format="png"))
    plt.close(figure)
    return out

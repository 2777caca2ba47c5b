"""Table and plot of a study: mean and spread over seeds, cost relative to the baseline of the same seed."""

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

# Metric: heading, digits, and whether more is better.
METRICS = {
    "flops": ("FLOPs", 3, False),
    "cpu_seconds": ("CPU time", 3, False),
    "passes": ("passes", 0, False),
    "seconds_of_1": ("CPU time, 1 image", 3, False),
    "seconds_of_16": ("of 16", 3, False),
    "training_loss": ("training loss", 3, False),
    "validation_loss": ("held-out loss", 3, False),
    "fd_efflite0": ("FD-EffLite0", 1, False),
    "fd_efflite0_unguided": ("FD-EffLite0, no guidance", 1, False),
    "r1": ("R@1 of 64", 3, True),
    "colours": ("colours", 3, True),
    "agreement": ("agreement", 3, True),
}
COSTS = ("flops", "cpu_seconds", "seconds_of_1", "seconds_of_16")  # relative to the baseline
NOT_QUALITY = (*COSTS, "passes")


def relative_to_baseline(results: Sequence[dict[str, Any]], baseline: str) -> list[dict[str, Any]]:
    """Copies of ``results`` with costs divided by those of the baseline with the same seed.

    Raises:
        ValueError: if a seed has no baseline.
    """
    base = {result["seed"]: result for result in results if result["variant"] == baseline}
    missing = sorted({result["seed"] for result in results} - base.keys())
    if missing:
        raise ValueError(
            f"variants: seeds {missing} lack {baseline!r}, the variant that costs are relative to; add it."
        )
    return [
        {**result, **{cost: result[cost] / base[result["seed"]][cost] for cost in COSTS if cost in result}}
        for result in results
    ]


def summarise(results: Sequence[dict[str, Any]]) -> dict[str, dict[str, tuple[float, float]]]:
    """Mean and sample standard deviation (0 for one seed) of every metric, by variant in order of appearance."""
    summary: dict[str, dict[str, tuple[float, float]]] = {}
    for variant in dict.fromkeys(result["variant"] for result in results):
        mine = [result for result in results if result["variant"] == variant]
        values = {name: [result[name] for result in mine] for name in METRICS if name in mine[0]}
        summary[variant] = {k: (fmean(v), stdev(v) if len(v) > 1 else 0.0) for k, v in values.items()}
    return summary


def table(summary: dict[str, dict[str, tuple[float, float]]], seeds: int) -> str:
    """The summary as a Markdown table; the best mean of every column but the costs is bold."""
    names = [name for name in METRICS if all(name in row for row in summary.values())]
    best = {
        name: (max if METRICS[name][2] else min)(row[name][0] for row in summary.values())
        for name in names
        if name not in NOT_QUALITY
    }
    lines = [
        f"Mean ± standard deviation over {seeds} seed{'s' * (seeds > 1)}; costs relative to next-token training; losses "
        "in nats a code, each in its variant's own factorisation.",
        "",
        "| variant | " + " | ".join(METRICS[name][0] for name in names) + " |",
        "|---" * (len(names) + 1) + "|",
    ]
    for variant, row in summary.items():
        cells = []
        for name in names:
            mean, spread = row[name]
            digits = METRICS[name][1]
            text = f"{mean:.{digits}f}" + (
                f" ± {spread:.{digits}f}" if seeds > 1 and name not in ("flops", "passes") else ""
            )
            cells.append(f"**{text}**" if best.get(name) == mean else text)
        lines.append(f"| {variant} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def plot(summary: dict[str, dict[str, tuple[float, float]]], baseline: str, out: Path) -> None:
    """Every quality metric, one column each, against training FLOPs above and against passes of sampling below; bars are the
    spread over seeds. A line joins the runs of the baseline, whole and stopped early: variants on its better side gain
    something.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    left_out = (*NOT_QUALITY, "training_loss")
    names = [name for name in METRICS if name not in left_out and all(name in row for row in summary.values())]
    costs = {"flops": "training FLOPs, next-token = 1"}
    if all("passes" in row for row in summary.values()) and len({row["passes"] for row in summary.values()}) > 1:
        costs["passes"] = "forward passes of an image"
    figure, grid = plt.subplots(
        len(costs), len(names), figsize=(4.4 * len(names), 3.6 * len(costs)), dpi=120, squeeze=False
    )
    colors = plt.get_cmap("tab10").colors + plt.get_cmap("Set2").colors  # type: ignore[attr-defined]
    for panels, (cost, label) in zip(grid, costs.items(), strict=True):
        for axes, name in zip(panels, names, strict=True):
            for color, (variant, row) in zip(colors, summary.items(), strict=False):
                mean, spread = row[name]
                axes.errorbar(row[cost][0], mean, yerr=spread, fmt="o", ms=6, color=color, capsize=3, label=variant)
            if cost == "flops":
                plain = sorted((row[cost][0], row[name][0]) for variant, row in summary.items()
                               if variant.split(",")[0] == baseline)  # fmt: skip
                axes.plot(*zip(*plain, strict=True), color="gray", lw=1, ls="--", zorder=0)
            else:
                axes.set_xscale("log", base=2)
                axes.xaxis.set_major_formatter("{x:.0f}")
            better = "higher" if METRICS[name][2] else "lower"
            axes.set(title=f"{METRICS[name][0]} ({better} is better)", xlabel=label)
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(alpha=0.25)
    handles, labels = grid.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=min(4, len(labels)), frameon=False, fontsize=9)
    figure.tight_layout(rect=(0, 0.05 + 0.03 * (-(-len(labels) // 4)), 1, 1))
    figure.savefig(out)
    plt.close(figure)


def write_study(results: Sequence[dict[str, Any]], baseline: str, out: Path) -> str:
    """Write ``study.json``, ``table.md`` and ``study.png`` into ``out``; returns the table."""
    summary = summarise(relative_to_baseline(results, baseline))
    text = table(summary, len({result["seed"] for result in results}))
    (out / "study.json").write_text(json.dumps({"baseline": baseline, "runs": list(results)}, indent=2))
    (out / "table.md").write_text(text)
    plot(summary, baseline, out / "study.png")
    return text

"""Compare initialisations of image tables on a language model: one short training for every kind and seed.

    python recipes/init_study.py --config recipes/configs/smollm2_lora.yaml --out runs/init_study \\
        steps=200 validate_every=50

A kind is `image_init/head_init`, two settings of recipes/train.py. Runs follow one another; a finished one is not run again,
and its weights are removed. Writes `study.json` (every run) and `table.md`: validation loss in nats a code, next-token mode,
after every validation, mean and spread over the seeds.
"""

import argparse
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from unified.errors import explain_errors
from unified.settings import dump_settings, overrides_first
from unified.training.config import TrainConfig, load_config
from unified.training.loop import train
from unified.training.tracking import read_log

KINDS = ["text/normal", "text/zero", "text/text", "codebook/normal", "codebook/zero", "codebook/tied-like"]
WEIGHTS = ("base", "lora", "pipeline", "checkpoints")  # large, and not reported


def settings_of(config: str, overrides: Sequence[str], kind: str, seed: int, out: Path) -> TrainConfig:
    """Settings of one run. Raises ValueError for a kind without a slash, or as :func:`load_config`."""
    image_init, slash, head_init = kind.partition("/")
    if not slash:
        raise ValueError(f"kinds: {kind!r} is not of the form image_init/head_init, such as text/zero.")
    folder = out / f"{image_init}-{head_init}" / f"seed-{seed}"
    chosen = [f"model.image_init={image_init}", f"model.head_init={head_init}", f"output_dir={folder}", f"seed={seed}"]
    settings = load_config(config, ["checkpoint_every=null", *overrides, *chosen])
    if settings.validate_every is None:
        raise ValueError("validate_every: null, so there is no loss to compare; set it to a number of steps.")
    return settings


def train_and_measure(settings: TrainConfig, kind: str) -> dict[str, Any]:
    """Train unless ``result.json`` is there; returns the validation losses by step.

    Raises:
        ValueError: if the finished run had other settings.
    """
    out = Path(settings.output_dir)
    result_file = out / "result.json"
    if result_file.is_file():
        if (out / "config.yaml").read_text() != dump_settings(settings):
            raise ValueError(f"out: {str(out)!r} was run with other settings; choose another folder, or remove it.")
        return json.loads(result_file.read_text())
    shutil.rmtree(out, ignore_errors=True)  # an interrupted run starts again
    train(settings)
    losses = {str(record["step"]): record["validation_loss"] for record in read_log(out) if "validation_loss" in record}
    result = {"kind": kind, "seed": settings.seed, "validation_loss": losses}
    for name in WEIGHTS:
        shutil.rmtree(out / name, ignore_errors=True)
    result_file.write_text(json.dumps(result, indent=2))
    return result


def table(results: Sequence[dict[str, Any]]) -> str:
    """Mean and sample standard deviation over seeds as Markdown, a row for every kind; the best mean of a column is bold."""
    kinds, steps = list(dict.fromkeys(r["kind"] for r in results)), list(results[0]["validation_loss"])
    losses = {(k, s): [r["validation_loss"][s] for r in results if r["kind"] == k] for k in kinds for s in steps}
    means = {place: fmean(values) for place, values in losses.items()}
    lines = [
        "| image_init/head_init | " + " | ".join(f"step {s}" for s in steps) + " |",
        "|---" * (len(steps) + 1) + "|",
    ]
    for kind in kinds:
        cells = []
        for step in steps:
            mean, values = means[kind, step], losses[kind, step]
            text = f"{mean:.3f}" + (f" ± {stdev(values):.3f}" if len(values) > 1 else "")
            cells.append(f"**{text}**" if mean == min(means[k, step] for k in kinds) else text)
        lines.append(f"| {kind} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def study(config: str, overrides: Sequence[str], kinds: Sequence[str], seeds: Sequence[int], out: Path) -> str:
    """Run what is not finished, seed by seed; writes ``study.json`` and ``table.md`` and returns the table."""
    runs = [(kind, settings_of(config, overrides, kind, seed, out)) for seed in seeds for kind in kinds]
    results = [train_and_measure(settings, kind) for kind, settings in runs]
    text = table(results)
    (out / "study.json").write_text(
        json.dumps({"config": config, "overrides": list(overrides), "runs": results}, indent=2)
    )
    (out / "table.md").write_text(text)
    return text


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line, run and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="config of recipes/train.py with model.backbone")
    parser.add_argument("--kinds", nargs="+", default=KINDS, metavar="KIND", help=f"(default: {' '.join(KINDS)})")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="(default: %(default)s)")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("overrides", nargs="*", help="key=value overrides of the config, for all runs")
    args = parser.parse_args(overrides_first(argv))
    print(study(args.config, args.overrides, args.kinds, args.seeds, args.out))


if __name__ == "__main__":
    explain_errors(main)

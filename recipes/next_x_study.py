"""Ways to predict an image side by side: orders, merges and patch schedules on the same data, captions and seeds.

    python recipes/next_x_study.py --config recipes/configs/npp_study_shapes.yaml --data data/shapes --split validation \\
        --clip runs/npp_study/shapes_clip --out runs/next_x/shapes --variants next-token diagonals channel

Trains every variant with every seed, generates images for the same captions and measures them: quality, held-out nats a code
in the variant's own factorisation, passes and CPU seconds an image. A class-conditional config is studied with classes in place
of captions, with guidance and without it. A finished run is not run again. Writes `study.json` (every run), `table.md` (mean and
spread) and `study.png` (quality against cost and against passes). The top of each config lists the commands to run before:
tokenizers, codes, a small CLIP. `--help` lists all variants.
"""

import argparse
import json
import multiprocessing
import shutil
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import datasets
import torch
from PIL import Image
from tqdm import tqdm

from next_x_study_report import write_study
from unified import UnifiedConfig, UnifiedPipeline
from unified.data.code_cache import load_codes
from unified.data.crops import fit
from unified.data.sources import load_source
from unified.errors import explain_errors
from unified.lora.base import base_of
from unified.model.prefix import BOI, EOI, NO_TEXT
from unified.prediction.merge import merged_grid
from unified.prediction.schedule import schedule_flops
from unified.settings import dump_settings, overrides_first, refuse_other
from unified.training.config import TrainConfig, load_config
from unified.training.loop import train
from unified.training.validation import image_loss
from unified_eval.clip import clip_features, load_clip, retrieval_at_1
from unified_eval.features import load_extractor
from unified_eval.frechet import frechet_distance
from unified_eval.generation import call_pipeline, stream_images
from unified_eval.selection import choose_evenly, first_usable_rows, unique_captions
from unified_eval.shapes import find_shapes, shapes_accuracy
from unified_eval.sheets import captioned_grid, in_rows
from unified_tokenizers import AutoImageTokenizer, load_text_tokenizer

ONES = ["schedule.patch_sizes=[1]", "schedule.shares=[1.0]"]
HALVES = ["schedule.patch_sizes=[2,1]", "schedule.shares=[0.5,0.5]"]
CHANNEL = "prediction.merge=channel"
CHAINED = "prediction.chained=true"
BASELINE = "next-token"

# Overrides of the config, and None or the variant at whose training FLOPs the training stops.
VARIANTS: dict[str, tuple[list[str], str | None]] = {
    BASELINE: (ONES, None),
    # Orders, at the cost of next-token training
    "rows": ([*ONES, "prediction.order=rows"], BASELINE),
    "rows at once": ([*ONES, "prediction.order=rows_at_once"], BASELINE),
    "diagonals": ([*ONES, "prediction.order=diagonals"], BASELINE),
    "regions": ([*ONES, "prediction.order=regions"], BASELINE),
    "cells": ([*ONES, "prediction.order=cells"], BASELINE),
    "spread": ([*ONES, "prediction.order=spread"], BASELINE),
    "locality": ([*ONES, "prediction.order=locality"], BASELINE),
    "random": ([*ONES, "prediction.order=random"], BASELINE),
    # Merges
    "channel": ([*ONES, CHANNEL], BASELINE),
    "channel chained": ([*ONES, CHANNEL, CHAINED], BASELINE),
    "channel 4": ([*ONES, CHANNEL, "prediction.window=4"], BASELINE),
    "channel, as many images": ([*ONES, CHANNEL], None),
    "channel diagonals": ([*ONES, CHANNEL, "prediction.order=diagonals"], BASELINE),
    "channel chained diagonals": ([*ONES, CHANNEL, CHAINED, "prediction.order=diagonals"], BASELINE),
    # Next-patch prediction, and before another last stage
    "next-token, cost of (2,1)": (ONES, "(2,1)"),
    "next-token, cost of (4,2,1)": (ONES, "(4,2,1)"),
    "(2,1)": (HALVES, None),
    "(2,1) diagonals": ([*HALVES, "prediction.order=diagonals"], None),
    "(2,1) channel": ([*HALVES, CHANNEL], BASELINE),
    "(2,1) channel chained": ([*HALVES, CHANNEL, CHAINED], BASELINE),
    "(2,1) unit": ([*HALVES, "model.options.coarse_positions=unit"], None),
    "(2,1) normalized": ([*HALVES, "model.options.coarse_positions=normalized"], None),
    "(2,1) 1d": ([*HALVES, "model.options.positions=1d"], None),
    "(2,1) per token": ([*HALVES, "model.options.loss_normalization=token"], None),
    "(2,1) one schedule": ([*HALVES, "schedule.restart=false"], None),
    "(2,1) mixed": ([*HALVES, "schedule.mixed=0.2"], None),
    "next-token 1d": ([*ONES, "model.options.positions=1d"], None),
    "(4,2,1)": (["schedule.patch_sizes=[4,2,1]", "schedule.shares=[0.4,0.3,0.3]"], None),
    "(4,1)": (["schedule.patch_sizes=[4,1]", "schedule.shares=[0.4,0.6]"], None),
    "(4,2,1) halves": (["schedule.levels=3"], None),
}
COST, RESULT = "cost.json", "result.json"  # of a training, and of all that was measured
MAIN = [
    BASELINE, "diagonals", "rows", "regions", "spread", "channel", "channel diagonals", "channel chained",
    "channel chained diagonals", "(2,1)", "(2,1) diagonals",
]  # fmt: skip


@dataclass(frozen=True)
class Run:
    """One training and its measurement."""

    variant: str
    seed: int
    config: str
    overrides: tuple[str, ...]
    like: tuple[str, ...] | None  # overrides of the variant at whose FLOPs the training stops
    data: str
    clip: str | None  # None for classes
    split: str
    num_images: int
    guidance_scale: float
    temperature: float
    out: str


def config_of(run: Run) -> TrainConfig:
    """The config of a run, which ends at the training FLOPs of another variant if that is wanted."""
    config = load_config(run.config, [*run.overrides, f"output_dir={run.out}", f"seed={run.seed}"])
    if run.like is not None:
        other = load_config(run.config, [*run.like, f"output_dir={run.out}"])
        config.steps = round(other.steps * flops_per_image(other) / flops_per_image(config))
    return config


def measured(run: Run) -> dict[str, Any] | None:
    """What was measured of a finished run; None for one that is not finished.

    Raises:
        ValueError: if the run in the folder was trained or measured with other settings.
    """
    out = Path(run.out)
    if (out / COST).is_file() and (out / "config.yaml").read_text() != dump_settings(config_of(run)):
        raise ValueError(f"out: {run.out!r} was trained with other settings; choose another folder, or remove it.")
    if not (out / RESULT).is_file():
        return None
    result = json.loads((out / RESULT).read_text())
    refuse_other("out", out, result["measured_with"], measured_with(run))
    return result


def measured_with(run: Run) -> dict[str, Any]:
    """The settings of a run's measurement."""
    return {
        name: getattr(run, name) for name in ("data", "split", "clip", "num_images", "guidance_scale", "temperature")
    }


def train_and_measure(run: Run) -> dict[str, Any]:
    """Train one variant and measure it. A finished training is kept: delete ``result.json`` to measure again.

    Raises:
        ValueError: as :func:`measured`.
    """
    finished = measured(run)
    if finished is not None:
        return finished
    out, config = Path(run.out), config_of(run)
    torch.set_num_threads(1)
    if not (out / COST).is_file():
        shutil.rmtree(out, ignore_errors=True)  # an interrupted run starts again, so that all of its cost is measured
        started = time.process_time()
        train(config)
        (out / COST).write_text(json.dumps({"cpu_seconds": time.process_time() - started}))
    pipeline = UnifiedPipeline.from_pretrained(out / "pipeline")
    result = {
        "variant": run.variant,
        "seed": run.seed,
        "steps": config.steps,
        "images": config.steps * config.batch_size,
        "measured_with": measured_with(run),
        **json.loads((out / COST).read_text()),
        "flops": flops_per_image(config) * config.steps * config.batch_size,
        "passes": passes(pipeline),
        **losses(config, pipeline),
        **sampling_seconds(run, pipeline),
        **(image_quality(run, config, pipeline) if run.num_images else {}),
    }
    (out / RESULT).write_text(json.dumps(result, indent=2))
    return result


def flops_per_image(config: TrainConfig) -> float:
    """Mean training FLOPs an image by the formula of ``unified.prediction.schedule``, with the captions' mean length."""
    classes, tokenizer = conditioning_of(config), config.model.text_tokenizer
    grid, caption_tokens = sizes_of(
        str(config.data.train), config.data.train_split, None if classes else str(tokenizer)
    )
    if classes:
        text, boi, eoi, text_positions = NO_TEXT, BOI, EOI, 0.0  # the class runs in place of the last code
    else:
        words = load_text_tokenizer(str(tokenizer))
        text, boi, eoi = {"vocab_size": words.vocab_size}, words.boi_token_id, words.eoi_token_id
        text_positions = caption_tokens + 2  # <bos>, <boi>
    model_config = UnifiedConfig(
        text_config={**(config.model.architecture or {}), **text},
        codebook_size=AutoImageTokenizer.from_pretrained(str(config.model.image_tokenizer)).codebook_size,
        boi_token_id=boi,
        eoi_token_id=eoi,
        prediction=None if config.prediction is None else config.prediction.build(),
        conditioning=classes,
    )
    return schedule_flops(config.patch_schedule(), model_config, grid, text_positions)


@cache
def sizes_of(codes: str, split: str, text_tokenizer: str | None) -> tuple[tuple[int, int], float]:
    """The grid of a codes cache, and its captions' mean number of tokens; 0 without a text tokenizer, for classes.

    Raises:
        ValueError: if there are images of several grids.
    """
    rows = load_codes(codes, split, None, "captioned" if text_tokenizer else "labelled")
    grids = {(int(h), int(w)) for h, w in zip(rows["height"], rows["width"], strict=True)}
    if len(grids) > 1:
        raise ValueError(f"data.train: images of several grids {sorted(grids)}; a study needs one.")
    if text_tokenizer is None:
        return grids.pop(), 0.0
    tokenizer = load_text_tokenizer(text_tokenizer)
    lengths = [len(tokenizer.encode(caption)) for caption in rows["caption"]]
    return grids.pop(), sum(lengths) / len(lengths)


def conditioning_of(config: TrainConfig) -> dict[str, Any] | None:
    """The classes of a class-conditional model; None for one that reads captions."""
    return config.model.options.get("conditioning")


def passes(pipeline: UnifiedPipeline) -> int:
    """Forward passes of an image in plain decoding, its prompt's included."""
    model = base_of(pipeline.model)
    ((height, width),) = model.config.image_grids or []
    plan = model.prediction.plan(merged_grid((height, width), model.prediction.merge.side))
    return 1 + len(set(plan.passes[plan.passes <= plan.groups.max()].tolist()))


def sampling_seconds(run: Run, pipeline: UnifiedPipeline) -> dict[str, float]:
    """CPU seconds an image on one thread, one at a time and 16 together: the least of three."""
    pipeline.set_progress_bar_config(disable=True)
    prompt: list[Any] = [0] if base_of(pipeline.model).config.classes else ["a red circle"]
    seconds = {}
    for count in (1, 16):
        taken = []
        for _ in range(4):  # the first one prepares the decoder
            started = time.process_time()
            call_pipeline(
                pipeline, prompt, num_images_per_prompt=count, guidance_scale=run.guidance_scale, output_type="codes"
            )
            taken.append((time.process_time() - started) / count)
        seconds[f"seconds_of_{count}"] = min(taken[1:])
    return seconds


def losses(config: TrainConfig, pipeline: UnifiedPipeline) -> dict[str, float]:
    """Losses in nats a code in the model's own factorisation, on held-out rows and on as many training rows."""
    classes = conditioning_of(config)
    kind = "labelled" if classes else "captioned"
    held_out = load_codes(str(config.data.validation or config.data.train), config.data.validation_split, None, kind)
    seen = load_codes(str(config.data.train), config.data.train_split, None, kind)
    seen = seen.select(range(min(len(seen), len(held_out))))
    model, text_tokenizer = base_of(pipeline.model), None if classes else pipeline.text_tokenizer
    return {
        name: image_loss(model, rows, text_tokenizer, model.config, config.batch_size, torch.device("cpu"))
        for name, rows in (("validation_loss", held_out), ("training_loss", seen))
    }


def image_quality(run: Run, config: TrainConfig, pipeline: UnifiedPipeline) -> dict[str, float]:
    """Generate an image for each chosen caption, or for the classes of as many images, and compare them with the real ones.

    Returns:
        FD-EffLite0, and with captions R@1 among 64 and agreement on shapes, with classes FD-EffLite0 without guidance.
    """
    classes = conditioning_of(config)
    column = config.data.class_column if classes else config.data.caption_column
    rows, _ = first_usable_rows(run.data, run.split, None, caption_column=column)
    chosen = choose_evenly(rows if classes else unique_captions(rows), run.num_images, 0)
    captions = [row.caption for row in chosen]
    prompts: list[Any] = pipeline.get_label_ids(captions) if classes else captions
    size, _ = pipeline.default_size

    def generate(guidance_scale: float) -> list[Image.Image]:
        options: dict[str, Any] = {"guidance_scale": guidance_scale, "temperature": run.temperature}
        return list(stream_images(pipeline, prompts, range(len(prompts)), **options))

    images = generate(run.guidance_scale)
    captioned_grid(in_rows(images[:32], 8), in_rows(captions[:32], 8)).save(Path(run.out) / "samples.png")
    extractor = load_extractor("efficientnet-lite0")
    real = extractor([fit(row.image, size) for row in chosen])
    quality = {extractor.key: frechet_distance(extractor(images), real)}
    if classes:
        plain = extractor(images if run.guidance_scale == 1 else generate(1.0))
        return quality | {f"{extractor.key}_unguided": frechet_distance(plain, real)}
    clip = load_clip(str(run.clip))
    blocks = [slice(start, start + 64) for start in range(0, len(captions), 64)]
    hits = [retrieval_at_1(*clip_features(clip, images[b], captions[b]), captions[b]) for b in blocks]
    return quality | {"r1": sum(hits) / len(hits)} | agreement(run, [row.row for row in chosen], images)


def agreement(run: Run, rows: Sequence[int], images: Sequence[Image.Image]) -> dict[str, float]:
    """Agreement of scenes with their captions; empty for data without ground truth.

    ``agreement`` is the share of scenes in which every claim of the caption holds; ``colours`` is the share of the colours in
    the captions that a shape or the background has.
    """
    data = datasets.load_from_disk(run.data)[run.split]
    if "include" not in data.column_names:
        return {}
    claims = [json.loads(text) for text in data.select(rows)["include"]]
    hits = []
    for image, claimed in zip(images, claims, strict=True):
        found = find_shapes(image)
        seen = {found.background, *(shape.colour for shape in found.shapes)}
        hits += [claim["color"] in seen for claim in claimed if "color" in claim]
    return {"agreement": shapes_accuracy(images, claims).metrics["shapes_correct"], "colours": sum(hits) / len(hits)}


def plan(args: argparse.Namespace) -> list[Run]:
    """All runs of the chosen variants and seeds, seed by seed."""
    classes = conditioning_of(load_config(args.config, [*args.overrides, "output_dir=unused"]))
    if classes and args.clip:
        raise ValueError("clip: a class-conditional model has no captions to find its images by; leave it out.")
    if not classes and not args.clip and args.num_images:
        raise ValueError("clip: missing, and images are found by their captions; give a folder of eval/train_clip.py.")
    runs = []
    for seed in args.seeds:
        for variant in args.variants:
            own, like = VARIANTS[variant]
            overrides = (*own, *args.overrides)
            load_config(args.config, [*overrides, "output_dir=unused"])  # whatever is wrong shows before the first run
            other = None if like is None else (*VARIANTS[like][0], *args.overrides)
            folder = "".join(c if c.isalnum() else "-" for c in variant).strip("-")
            out = f"{args.out}/{folder}/seed-{seed}"
            runs.append(
                Run(variant, seed, args.config, overrides, other, args.data, args.clip, args.split, args.num_images,
                    args.guidance_scale, args.temperature, out)
            )  # fmt: skip
    if len({run.out for run in runs}) < len(runs):
        raise ValueError("seeds, variants: one is given twice; leave it out.")
    return runs


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="config of recipes/train.py that all runs share")
    parser.add_argument(
        "--data", required=True, help="images with captions or classes that generated ones are compared with"
    )
    parser.add_argument(
        "--split",
        default="train",
        help="split of --data whose captions or classes are generated (default: %(default)s)",
    )
    parser.add_argument("--clip", help="CLIP folder for R@1 of captions, as written by eval/train_clip.py")
    parser.add_argument(
        "--num-images",
        type=int,
        default=128,
        help="images generated per run, 0 for losses alone (default: %(default)s)",
    )
    parser.add_argument("--guidance-scale", type=float, default=1.5, help="of all images (default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=1.0, help="of all images (default: %(default)s)")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=MAIN, metavar="NAME",
                        help=f"which to train, among: {'; '.join(VARIANTS)}")  # fmt: skip
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="(default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each (default: %(default)s)")
    parser.add_argument("--out", required=True, help="folder to write")
    parser.add_argument("overrides", nargs="*", help="key=value overrides of the config, for all runs")
    return parser.parse_args(overrides_first(argv))


def main(argv: Sequence[str] | None = None) -> None:
    """Run what is not finished, then write table and plot."""
    args = parse_arguments(argv)
    if args.jobs < 1:
        raise ValueError(f"jobs: {args.jobs} must be at least 1.")
    runs = plan(args)
    if args.num_images:
        load_source(args.data, args.split)  # a mistake shows before the trainings
    results = {run: measured(run) for run in runs}
    left = [run for run in runs if results[run] is None]
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(args.jobs, mp_context=spawn, max_tasks_per_child=1) as pool:
        results |= zip(
            left, tqdm(pool.map(train_and_measure, left), total=len(left), desc="runs", unit="run"), strict=True
        )
    print(write_study([result for result in results.values() if result is not None], BASELINE, Path(args.out)))


if __name__ == "__main__":
    explain_errors(main)

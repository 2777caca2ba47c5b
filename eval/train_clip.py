"""Train a small CLIP on captioned images, for CLIP scores without a download.

    python eval/train_clip.py --data data/openmoji --split train --out runs/openmoji/clip --name openmoji-nano

The folder can be given to `eval/evaluate.py --clip` and loads in open_clip as `local-dir:<folder>`. Its scores are
printed with its name, as in `CLIP score (openmoji-nano)`.
"""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from unified.data import SkipReport
from unified.errors import explain_errors
from unified_eval.clip import caption_key
from unified_eval.command_line import add_column_arguments, check_counts, check_folder
from unified_eval.nano_clip import check_nano_clip_folder, grouped_retrieval, save_nano_clip, shrink, train_nano_clip
from unified_eval.selection import usable_images


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="data folder, file or Hub name with captioned images")
    parser.add_argument("--split", default="train", help="split to train on (default: %(default)s)")
    parser.add_argument("--max-samples", type=int, help="train on the first this many usable rows (default: all)")
    parser.add_argument(
        "--validation-split",
        default="validation",
        help="split to measure on; 'none' for no such split (default: %(default)s)",
    )
    add_column_arguments(parser)
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--name", required=True, help="name its scores carry, for example openmoji-nano")
    parser.add_argument("--steps", type=int, default=180, help="optimizer steps (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=64, help="images per step (default: %(default)s)")
    parser.add_argument("--learning-rate", type=float, default=2e-3, help="peak learning rate (default: %(default)s)")
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of weights, batches and augmentation (default: %(default)s)"
    )
    return parser.parse_args(argv)


def read(args: argparse.Namespace, split: str, most: int | None = None) -> tuple[list[Image.Image], list[str]]:
    """The usable images of a split at the size that the CLIP sees, and their captions."""
    report = SkipReport()
    rows = usable_images(args.data, split, most, args.image_column, args.caption_column, report)
    pairs = [(shrink(row.image), row.caption) for row in rows]
    print(f"{args.data} [{split}]: {report.summary()}")
    return [image for image, _ in pairs], [caption for _, caption in pairs]


def main(argv: Sequence[str] | None = None) -> None:
    """Train, measure on training and held-out images, and save."""
    # 1. Read the images.
    args = parse_arguments(argv)
    check_counts(args, "steps", "batch_size")
    check_folder("out", args.out)
    if not args.name.strip():
        raise ValueError("--name: empty; give the name that its scores carry.")
    if not 0 < args.learning_rate < float("inf"):
        raise ValueError(f"--learning-rate: {args.learning_rate} is not a finite number above 0.")
    if args.seed < 0:
        raise ValueError(f"--seed: {args.seed} is below 0.")
    check_nano_clip_folder(args.out)
    parts = {"train": read(args, args.split, args.max_samples)}
    if args.validation_split != "none":
        parts["validation"] = read(args, args.validation_split)

    # 2. Train.
    start = time.perf_counter()
    clip = train_nano_clip(
        *parts["train"],
        args.name,
        steps=args.steps,
        batch_size=args.batch_size,
        learning_rate=args.learning_rate,
        seed=args.seed,
    )
    seconds = time.perf_counter() - start

    # 3. Measure, with one image for each caption.
    accuracy = {}
    for part, (images, captions) in parts.items():
        first: dict[str, int] = {}
        for number, caption in enumerate(captions):
            first.setdefault(caption_key(caption), number)
        numbers = list(first.values())
        accuracy[part] = grouped_retrieval(clip, [images[i] for i in numbers], [captions[i] for i in numbers])

    # 4. Write.
    record = {
        "data": args.data,
        "split": args.split,
        "validation_split": args.validation_split,
        "samples": len(parts["train"][0]),
        "steps": args.steps,
        "batch_size": args.batch_size,
        "learning_rate": args.learning_rate,
        "seed": args.seed,
        "parameters": sum(parameter.numel() for parameter in clip.model.parameters()),
        "seconds": round(seconds, 1),
        "retrieval_at_1": accuracy,
    }
    save_nano_clip(clip, args.out, record)
    for part, found in accuracy.items():
        print(f"{part}: R@1 {found['r1']:.3f} among {found['captions']} captions")
    print(f"{args.out}: {args.name}, {record['parameters']:,} parameters, {seconds:.0f} s")


if __name__ == "__main__":
    explain_errors(main)

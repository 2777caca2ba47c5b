"""Train a small CLIP on captioned images, for CLIP scores without a download.

    python eval/train_clip.py --data data/openmoji --split train --out runs/openmoji/clip --name openmoji-nano

The folder can be given to `eval/evaluate.py --clip` and loads in open_clip as `local-dir:<folder>`. Its scores are
printed with its name, as in `CLIP score (openmoji-nano)`.
"""

import argparse
import time
from pathlib import Path

from unified.data.sources import CaptionedImage
from unified_eval.nano_clip import grouped_retrieval, save_nano_clip, train_nano_clip
from unified_eval.selection import first_usable_rows, unique_captions


def parse_arguments() -> argparse.Namespace:
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
    parser.add_argument("--image-column", default="image", help="column of the images (default: %(default)s)")
    parser.add_argument("--caption-column", default="caption", help="column of the captions (default: %(default)s)")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--name", required=True, help="name its scores carry, for example openmoji-nano")
    parser.add_argument("--steps", type=int, default=180, help="optimizer steps (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=64, help="pictures per step (default: %(default)s)")
    parser.add_argument("--learning-rate", type=float, default=2e-3, help="peak learning rate (default: %(default)s)")
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of weights, batches and augmentation (default: %(default)s)"
    )
    return parser.parse_args()


def main() -> None:
    """Train, measure on training and held-out images, and save."""
    args = parse_arguments()
    columns = {"image_column": args.image_column, "caption_column": args.caption_column}
    rows, report = first_usable_rows(args.data, args.split, args.max_samples, **columns)
    print(f"{args.data} [{args.split}]: {report.summary()}")
    held_out: list[CaptionedImage] = []
    if args.validation_split != "none":
        held_out, report = first_usable_rows(args.data, args.validation_split, **columns)
        print(f"{args.data} [{args.validation_split}]: {report.summary()}")

    start = time.perf_counter()
    clip = train_nano_clip(
        [row.image for row in rows],
        [row.caption for row in rows],
        args.name,
        steps=args.steps,
        batch_size=args.batch_size,
        learning_rate=args.learning_rate,
        seed=args.seed,
    )
    seconds = time.perf_counter() - start

    accuracy = {}
    for part, part_rows in (("train", rows), ("validation", held_out)):
        if part_rows:
            distinct = unique_captions(part_rows)
            accuracy[part] = grouped_retrieval(clip, [row.image for row in distinct], [row.caption for row in distinct])
    record = {
        "data": args.data,
        "split": args.split,
        "validation_split": args.validation_split,
        "samples": len(rows),
        "steps": args.steps,
        "batch_size": args.batch_size,
        "learning_rate": args.learning_rate,
        "seed": args.seed,
        "parameters": sum(parameter.numel() for parameter in clip.model.parameters()),
        "seconds": round(seconds, 1),
        "retrieval_at_1": accuracy,
    }
    save_nano_clip(clip, args.out, record)
    for part, figures in accuracy.items():
        print(f"{part}: R@1 {figures['r1']:.3f} among {figures['captions']} captions")
    print(f"{args.out}: {args.name}, {record['parameters']:,} parameters, {seconds:.0f} s")


if __name__ == "__main__":
    main()

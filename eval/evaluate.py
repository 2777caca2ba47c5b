"""Generate one picture for each of some captions of a data set, and measure the pictures.

    python eval/evaluate.py --pipeline runs/openmoji/pipeline --data data/openmoji --split train --max-samples 480 \\
        --num-images 64 --clip runs/openmoji/clip --out runs/openmoji/evaluation

The folder gets `metrics.json` (figures, the recipe of each, and the run), `generated/NNN.png`, `samples.png` (every
generated picture with its caption) and `comparison.png` (real, through the tokenizer, generated).
"""

import argparse
import json
import time
from importlib.metadata import version
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm

from unified import UnifiedPipeline
from unified.data import CaptionedImage, fit_square
from unified_eval.clip import load_clip
from unified_eval.evaluate import evaluate_pictures, evaluate_tokenizer, recipe_line
from unified_eval.features import EXTRACTORS, load_extractor
from unified_eval.reconstruction import reconstruct
from unified_eval.report import format_value
from unified_eval.selection import choose_evenly, first_usable_rows, unique_captions
from unified_eval.sheets import captioned_grid, in_rows


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_argument_group("what is measured")
    what.add_argument("--pipeline", required=True, help="pipeline folder, or its name on the Hub")
    what.add_argument("--lora", help="LoRA adapter folder to load into the pipeline")
    what.add_argument("--data", required=True, help="data folder, file or Hub name with captioned pictures")
    what.add_argument("--split", default="train", help="split of the captions and real pictures (default: %(default)s)")
    what.add_argument("--max-samples", type=int, help="use the first this many usable rows of the split (default: all)")
    what.add_argument(
        "--num-images", type=int, default=64, help="captions chosen evenly among them (default: %(default)s)"
    )
    what.add_argument("--psnr-data", help="data for the tokenizer's PSNR (default: that of --data)")
    what.add_argument(
        "--psnr-split",
        default="validation",
        help="split for the tokenizer's PSNR; 'none' skips it (default: %(default)s)",
    )
    what.add_argument("--image-column", default="image", help="column of the pictures (default: %(default)s)")
    what.add_argument("--caption-column", default="caption", help="column of the captions (default: %(default)s)")
    measure = parser.add_argument_group("how it is measured")
    measure.add_argument(
        "--clip", required=True, help="CLIP folder, open_clip 'architecture/tag', or 'hf-hub:owner/name'"
    )
    measure.add_argument(
        "--extractor", choices=EXTRACTORS, default=EXTRACTORS[0], help="feature network (default: %(default)s)"
    )
    measure.add_argument("--inception-weights", type=Path, help="weights file of the inception extractor")
    draw = parser.add_argument_group("how pictures are drawn")
    draw.add_argument(
        "--guidance-scale", type=float, default=3.0, help="classifier-free guidance (default: %(default)s)"
    )
    draw.add_argument("--temperature", type=float, default=1.0, help="sampling temperature (default: %(default)s)")
    draw.add_argument("--top-k", type=int, default=0, help="codes kept for sampling, 0 for all (default: %(default)s)")
    draw.add_argument(
        "--top-p", type=float, default=1.0, help="probability mass kept for sampling (default: %(default)s)"
    )
    draw.add_argument(
        "--seed", type=int, default=0, help="seed of the choice; picture i gets seed + i (default: %(default)s)"
    )
    draw.add_argument(
        "--batch-size", type=int, default=64, help="pictures drawn or measured at once (default: %(default)s)"
    )
    draw.add_argument("--device", default="cpu", help="device of the pipeline (default: %(default)s)")
    parser.add_argument("--out", type=Path, required=True, help="folder to write; earlier results in it are replaced")
    args = parser.parse_args()
    if args.inception_weights is not None and args.extractor != "inception":
        parser.error(f"--inception-weights is for --extractor inception, not {args.extractor}")
    if args.batch_size < 1:
        parser.error(f"--batch-size: {args.batch_size} is below 1")
    return args


def draw_pictures(pipeline: UnifiedPipeline, captions: list[str], args: argparse.Namespace) -> list[Image.Image]:
    """One picture for each caption; a picture depends on its own seed only, not on the batch it is drawn in."""
    pipeline.set_progress_bar_config(disable=True)
    pictures: list[Image.Image] = []
    with tqdm(total=len(captions), desc="generate", unit="picture") as bar:
        for start in range(0, len(captions), args.batch_size):
            prompts = captions[start : start + args.batch_size]
            pictures += pipeline(
                prompts,
                generator=[torch.Generator().manual_seed(args.seed + start + index) for index in range(len(prompts))],
                guidance_scale=args.guidance_scale,
                temperature=args.temperature,
                top_k=args.top_k,
                top_p=args.top_p,
            ).images
            bar.update(len(prompts))
    return pictures


def write_pictures(
    out: Path, captions: list[str], real: list[Image.Image], rebuilt: list[Image.Image], generated: list[Image.Image]
) -> None:
    """Write every generated picture, and the two sheets."""
    folder = out / "generated"
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("[0-9]*.png"):
        old.unlink()
    for number, picture in enumerate(generated):
        picture.save(folder / f"{number:03d}.png")
    captioned_grid(in_rows(generated, 8), in_rows(captions, 8)).save(out / "samples.png")
    rows = [list(pictures) for pictures in zip(real, rebuilt, generated, strict=True)][:12]
    titles = ["real", "reconstruction", "generated"]
    captioned_grid(rows, column_titles=titles, row_titles=captions[:12]).save(out / "comparison.png")


def main() -> None:
    """Choose captions, draw, measure, write and print."""
    args = parse_arguments()
    columns = {"image_column": args.image_column, "caption_column": args.caption_column}
    rows, report = first_usable_rows(args.data, args.split, args.max_samples, **columns)
    print(f"{args.data} [{args.split}]: {report.summary()}")
    distinct = unique_captions(rows)
    if len(distinct) < len(rows):
        print(f"  {len(rows) - len(distinct)} rows with a repeated caption left out")
    chosen = choose_evenly(distinct, args.num_images, args.seed)
    chosen_rows = {row.row for row in chosen}
    rest = [row for row in distinct if row.row not in chosen_rows]
    others = choose_evenly(rest, args.num_images, args.seed) if len(rest) >= args.num_images else None
    psnr_data = args.psnr_data or args.data
    held_out: list[CaptionedImage] = []
    if args.psnr_split != "none":
        held_out, report = first_usable_rows(psnr_data, args.psnr_split, **columns)
        print(f"{psnr_data} [{args.psnr_split}]: {report.summary()}")
    clip = load_clip(args.clip)
    extractor = load_extractor(args.extractor, args.inception_weights)
    pipeline = UnifiedPipeline.from_pretrained(args.pipeline).to(args.device)
    if args.lora:
        pipeline.load_lora_weights(args.lora)
    height, width = pipeline.default_size
    if height != width:
        raise ValueError(f"pipeline: draws {height}x{width} pictures; real ones are cropped to squares to be compared.")

    captions = [row.caption for row in chosen]
    start = time.perf_counter()
    generated = draw_pictures(pipeline, captions, args)
    seconds = time.perf_counter() - start
    real = [fit_square(row.image, width) for row in chosen]
    rebuilt = reconstruct(pipeline.image_tokenizer, real, args.batch_size)
    other_real = [fit_square(row.image, width) for row in others] if others else None
    result = evaluate_pictures(
        real, rebuilt, generated, captions, clip, extractor, other_real, args.seed, args.batch_size, progress=True
    )
    if held_out:
        pictures = [fit_square(row.image, width) for row in held_out]
        reference = f"split {args.psnr_split} of {psnr_data}"
        part = evaluate_tokenizer(pipeline.image_tokenizer, pictures, reference, args.batch_size, progress=True)
        result = {key: result[key] | part[key] for key in result}

    args.out.mkdir(parents=True, exist_ok=True)
    write_pictures(args.out, captions, real, rebuilt, generated)
    result["run"] = {
        **{key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()},
        "samples": len(rows),
        "rows": [row.row for row in chosen],
        "captions": captions,
        "picture_size": [width, height],
        "seconds_per_picture": round(seconds / len(captions), 3),
        "versions": {name: version(name) for name in ("torch", "open-clip-torch", "pillow")},
    }
    text = json.dumps(result, indent=2, ensure_ascii=False, allow_nan=False)
    (args.out / "metrics.json").write_text(text + "\n", encoding="utf-8")
    print(f"\n{'figure':<62} {'value':>10}  recipe")
    for name, value in result["figures"].items():
        recipe = result["recipes"][name]
        print(f"{recipe['label']:<62} {format_value(value):>10}  {recipe_line(recipe)}")
    print(f"\n{args.out / 'metrics.json'}")


if __name__ == "__main__":
    main()

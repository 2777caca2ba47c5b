"""Generate images for some captions of a data set, measure them, and report; or compare two pipelines.

    python eval/evaluate.py --pipeline runs/openmoji/pipeline --data data/openmoji --split train --max-samples 480 \\
        --num-images 64 --clip runs/openmoji/clip --out runs/openmoji/evaluation
    python eval/evaluate.py --compare runs/a/pipeline runs/b/pipeline+runs/b/lora --data ... --out runs/comparison
    python eval/evaluate.py --compare runs/a/pipeline runs/a/pipeline --decoding plain gsd+int8 --data ... --out runs/fast

The folder gets `metrics.json` (metrics, 95 % intervals, the recipe of each, and the run), `report.html`,
`generated/NNN.png`, `samples.png` (every generated image with its caption) and `comparison.png` (real, through the
tokenizer, generated). Run again, it keeps images and features that are there. `accelerate launch` shares the work.
With `--compare`, `a/` and `b/` get these files, and the folder the differences in pairs.
"""

import argparse
import json
import shlex
import sys
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from unified import UnifiedPipeline
from unified.data.sources import CaptionedImage, fit_square
from unified.decoding import DECODING_MODES
from unified_eval.clip import load_clip
from unified_eval.diversity import nearest_neighbours
from unified_eval.drawing import content_hash, draw_images
from unified_eval.evaluate import DEFAULT_METRICS, METRICS, evaluate_tokenizer, measure_images, recipe_line
from unified_eval.evaluation_report import (
    Drawn,
    comparison_sheet,
    sample_sheet,
    shown,
    verdict,
    write_comparison_report,
    write_evaluation_report,
)
from unified_eval.extraction import extract_features, process_state
from unified_eval.features import EXTRACTORS, LOGITS_EXTRACTOR, load_extractor
from unified_eval.measures import Measures, SmallSampleWarning, compare_measures
from unified_eval.npz import save_npz
from unified_eval.reconstruction import reconstruct
from unified_eval.report import format_value
from unified_eval.selection import choose_evenly, first_usable_rows, unique_captions

INT8 = "+int8"
DECODING = [mode + weights for mode in DECODING_MODES for weights in ("", INT8)]


class Task(NamedTuple):
    """What every compared pipeline is asked for, and what it is measured against."""

    samples: int
    chosen: list[CaptionedImage]
    others: list[CaptionedImage]
    training: list[CaptionedImage]
    held_out: list[CaptionedImage]


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_argument_group("what is measured")
    systems = what.add_mutually_exclusive_group(required=True)
    systems.add_argument("--pipeline", help="pipeline folder, or its name on the Hub")
    systems.add_argument(
        "--compare", nargs=2, metavar=("A", "B"), help="two pipelines, each possibly with an adapter: PIPELINE+LORA"
    )
    what.add_argument("--lora", help="LoRA adapter folder to load into --pipeline")
    what.add_argument("--data", required=True, help="data folder, file or Hub name with captioned images")
    what.add_argument("--split", default="train", help="split of the captions and real images (default: %(default)s)")
    what.add_argument("--max-samples", type=int, help="use the first this many usable rows of the split (default: all)")
    what.add_argument(
        "--num-images", type=int, default=64, help="captions chosen evenly among them (default: %(default)s)"
    )
    what.add_argument("--samples-per-caption", type=int, default=1, help="pictures for each (default: %(default)s)")
    what.add_argument("--training-split", default="train", help="split searched for neighbours (default: %(default)s)")
    what.add_argument("--psnr-data", help="data for the tokenizer's PSNR (default: that of --data)")
    what.add_argument(
        "--psnr-split",
        default="validation",
        help="split for the tokenizer's PSNR; 'none' skips it (default: %(default)s)",
    )
    what.add_argument("--image-column", default="image", help="column of the images (default: %(default)s)")
    what.add_argument("--caption-column", default="caption", help="column of the captions (default: %(default)s)")
    measure = parser.add_argument_group("how it is measured")
    measure.add_argument(
        "--metrics", nargs="+", choices=METRICS, default=list(DEFAULT_METRICS), metavar="NAME",
        help=f"some of {', '.join(METRICS)} (default: {' '.join(DEFAULT_METRICS)})",
    )  # fmt: skip
    measure.add_argument(
        "--clip", required=True, help="CLIP folder, open_clip 'architecture/tag', or 'hf-hub:owner/name'"
    )
    measure.add_argument(
        "--extractor", choices=EXTRACTORS, default=EXTRACTORS[0], help="feature network (default: %(default)s)"
    )
    measure.add_argument("--inception-weights", type=Path, help="weights file of the inception extractor and of 'is'")
    measure.add_argument(
        "--resamples", type=int, default=200,
        help="draws of prompts for intervals of distances, 0 for none (default: %(default)s)",
    )  # fmt: skip
    measure.add_argument("--features", type=Path, help="folder of cached features (default: features/ in --out)")
    draw = parser.add_argument_group("how images are drawn")
    draw.add_argument(
        "--guidance-scale", type=float, default=3.0, help="classifier-free guidance (default: %(default)s)"
    )
    draw.add_argument("--temperature", type=float, default=1.0, help="sampling temperature (default: %(default)s)")
    draw.add_argument("--top-k", type=int, default=0, help="codes kept for sampling, 0 for all (default: %(default)s)")
    draw.add_argument(
        "--top-p", type=float, default=1.0, help="probability mass kept for sampling (default: %(default)s)"
    )
    draw.add_argument(
        "--decoding", nargs="+", choices=DECODING, default=["plain"], metavar="MODE",
        help=f"one of {', '.join(DECODING)}; with --compare one for both or one for each (default: plain)",
    )  # fmt: skip
    draw.add_argument(
        "--seed", type=int, default=0, help="seed of the choice; image i gets seed + i (default: %(default)s)"
    )
    draw.add_argument(
        "--batch-size", type=int, default=64, help="pictures sampled or measured at once (default: %(default)s)"
    )
    draw.add_argument("--device", default="cpu", help="device of the networks (default: %(default)s)")
    parser.add_argument("--out", type=Path, required=True, help="folder to write; earlier results in it are replaced")
    parser.add_argument("--npz", action="store_true", help="also write generated.npz for the evaluator of ADM")
    args = parser.parse_args()
    if args.inception_weights is not None and args.extractor != "inception" and "is" not in args.metrics:
        parser.error(f"--inception-weights is for --extractor inception, not {args.extractor}")
    if args.batch_size < 1 or args.samples_per_caption < 1:
        parser.error(
            f"--batch-size, --samples-per-caption: {args.batch_size}, {args.samples_per_caption} are not 1 or more"
        )
    if "diversity" in args.metrics and args.samples_per_caption < 2:
        parser.error("--metrics diversity needs --samples-per-caption 2 or more")
    count = 2 if args.compare else 1
    if len(args.decoding) not in (1, count):
        parser.error(f"--decoding: {len(args.decoding)} modes for {count} pipeline(s)")
    args.decoding = (args.decoding * count)[:count]
    if args.lora and args.compare:
        parser.error("--lora is for --pipeline; with --compare write PIPELINE+LORA")
    return args


def choose_task(args: argparse.Namespace) -> Task:
    """Read the data and choose captions, other real images, training and held-out images."""
    columns = {"image_column": args.image_column, "caption_column": args.caption_column}

    def read(source: str, split: str, most: int | None = None) -> list[CaptionedImage]:
        rows, report = first_usable_rows(source, split, most, **columns)
        say(f"{source} [{split}]: {report.summary()}")
        return rows

    rows = read(args.data, args.split, args.max_samples)
    distinct = unique_captions(rows)
    if len(distinct) < len(rows):
        say(f"  {len(rows) - len(distinct)} rows with a repeated caption left out")
    chosen = choose_evenly(distinct, args.num_images, args.seed)
    chosen_rows = {row.row for row in chosen}
    rest = [row for row in distinct if row.row not in chosen_rows]
    others = choose_evenly(rest, args.num_images, args.seed) if len(rest) >= args.num_images else []
    training: list[CaptionedImage] = []
    if "neighbours" in args.metrics:
        training = rows if args.training_split == args.split else read(args.data, args.training_split)
    held_out = read(args.psnr_data or args.data, args.psnr_split) if args.psnr_split != "none" else []
    if "shapes" in args.metrics and not all({"include", "tag"} <= set(row.extra) for row in chosen):
        raise ValueError(f"metrics: 'shapes' needs the columns include and tag, which {args.data!r} lacks.")
    return Task(len(rows), chosen, others, training, held_out)


def say(text: str) -> None:
    """Print once, whatever the number of processes."""
    if process_state().is_main_process:
        print(text)


def open_pipeline(name: str, lora: str | None, decoding: str, device: str) -> tuple[UnifiedPipeline, dict[str, str]]:
    """Load a pipeline and possibly an adapter; return it with what tells its images from others."""
    pipeline, identity = UnifiedPipeline.from_pretrained(name), {"pipeline_sha256": content_hash(name)}
    if lora:
        pipeline.load_lora_weights(lora)
        identity["lora_sha256"] = content_hash(lora)
    pipeline.to(device)
    if decoding.endswith(INT8):
        identity["weights"] = "int8"
        pipeline.enable_fast_decoding(int8=True)
    return pipeline, identity


def evaluate(
    args: argparse.Namespace,
    task: Task,
    name: str,
    lora: str | None,
    decoding: str,
    networks: dict[str, Any],
    out: Path,
) -> tuple[Measures, Drawn]:
    """Draw, measure and write the results of one pipeline."""
    pipeline, identity = open_pipeline(name, lora, decoding, args.device)
    height, width = pipeline.default_size
    if height != width:
        raise ValueError(
            f"pipeline: generates {height}x{width} images; real ones are cropped to squares to be compared."
        )

    def square(rows: list[CaptionedImage]) -> list[Image.Image]:
        return [fit_square(row.image, width) for row in rows]

    captions, real, progress = (
        [row.caption for row in task.chosen],
        square(task.chosen),
        process_state().is_main_process,
    )
    sampling = {key: getattr(args, key) for key in ("guidance_scale", "temperature", "top_k", "top_p")}
    sampling["decoding"] = decoding.removesuffix(INT8)
    generated, times = draw_images(
        pipeline, captions, out / "generated", args.samples_per_caption, args.seed, args.batch_size, sampling,
        identity, progress=True,
    )  # fmt: skip
    rebuilt = reconstruct(pipeline.image_tokenizer, real, args.batch_size)
    cache, originals = args.features or args.out / "features", square(task.training)
    training = reconstruct(pipeline.image_tokenizer, originals, args.batch_size, progress) if originals else []
    measures = measure_images(
        real, rebuilt, generated, captions, networks["clip"], networks["extractor"],
        square(task.others) if task.others else None, args.seed, args.batch_size, progress,
        metrics=args.metrics, training=training or None, resamples=args.resamples, cache=cache,
        claims=[row.extra["include"] for row in task.chosen] if "shapes" in args.metrics else None,
        tags=[row.extra["tag"] for row in task.chosen] if "shapes" in args.metrics else None,
        logits_extractor=networks.get("logits"),
    )  # fmt: skip
    drawn = Drawn(captions, real, rebuilt, generated, args.seed)
    if training:
        rows = [extract_features(networks["extractor"], part, args.batch_size, cache) for part in (generated, training)]
        found, distances = nearest_neighbours(rows[0], rows[1])
        near = [
            (training[i], task.training[i].caption, float(d)) for i, d in zip(found[:, 0], distances[:, 0], strict=True)
        ]
        drawn = drawn._replace(neighbours=near)
    result: dict[str, Any] = measures.result()
    if task.held_out:
        reference = f"split {args.psnr_split} of {args.psnr_data or args.data}"
        part = evaluate_tokenizer(pipeline.image_tokenizer, square(task.held_out), reference, args.batch_size, progress)
        result |= {key: result[key] | part[key] for key in part}
    result["run"] = {
        **{key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()},
        "pipeline": name,
        "lora": lora,
        "decoding": decoding,
        **identity,
        "samples": task.samples,
        "rows": [row.row for row in task.chosen],
        "captions": captions,
        "picture_size": [width, height],
        **times,
        "versions": {name: version(name) for name in ("torch", "open-clip-torch", "pillow")},
    }
    if process_state().is_main_process:
        write_results(args, out, result, drawn, measures)
    return measures, drawn


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write numbers that are all finite."""
    text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False)
    path.write_text(text + "\n", encoding="utf-8")


def write_results(
    args: argparse.Namespace, out: Path, result: dict[str, Any], drawn: Drawn, measures: Measures
) -> None:
    """Write `metrics.json`, the sheets and the report, and print the figures."""
    write_json(out / "metrics.json", result)
    sample_sheet(drawn).save(out / "samples.png")
    comparison_sheet(drawn).save(out / "comparison.png")
    if args.npz:
        save_npz(out / "generated.npz", drawn.generated)
    scores = measures.rows["clip_score"][0] if "clip_score" in measures.rows else None
    title = f"Evaluation of {result['run']['pipeline']}" + (
        f" with {result['run']['lora']}" if result["run"]["lora"] else ""
    )
    write_evaluation_report(out / "report.html", title, result, drawn, scores, shlex.join(["python", *sys.argv]))
    print(f"\n{'figure':<62} {'value [95 % interval]':>30}  recipe")
    for name, value in result["figures"].items():
        recipe = result["recipes"][name]
        print(f"{recipe['label']:<62} {shown(value, result['intervals'].get(name)):>30}  {recipe_line(recipe)}")
    for note in result["notes"]:
        print(f"note: {note}")
    print(f"\n{out / 'metrics.json'}\n{out / 'report.html'}")


def main() -> None:
    """Evaluate one pipeline, or two and their differences."""
    args = parse_arguments()
    warnings.simplefilter("ignore", SmallSampleWarning)  # they are printed as notes
    task = choose_task(args)
    networks: dict[str, Any] = {"clip": load_clip(args.clip)}
    networks["clip"].model.to(args.device)
    networks["extractor"] = load_extractor(
        args.extractor, args.inception_weights if args.extractor == "inception" else None, args.device
    )
    if "is" in args.metrics:
        networks["logits"] = load_extractor(LOGITS_EXTRACTOR, args.inception_weights, args.device)
    if args.pipeline:
        evaluate(args, task, args.pipeline, args.lora, args.decoding[0], networks, args.out)
        return
    found = []
    for letter, system, decoding in zip("ab", args.compare, args.decoding, strict=True):
        name, plus, lora = (system, "", "") if Path(system).exists() else system.rpartition("+")
        found.append(
            evaluate(args, task, name if plus else system, lora or None, decoding, networks, args.out / letter)
        )
    if not process_state().is_main_process:
        return
    differences = compare_measures(found[0][0], found[1][0])
    run = {"a": args.compare[0], "b": args.compare[1], "decoding": args.decoding}
    run |= {"num_images": args.num_images, "seed": args.seed}
    write_json(args.out / "metrics.json", {"differences": differences, "run": run, "notes": found[0][0].notes})
    command = shlex.join(["python", *sys.argv])
    names = ["A", "B"]
    systems = [
        f"{name}: {system}, decoding {decoding}."
        for name, system, decoding in zip(names, args.compare, args.decoding, strict=True)
    ]
    notes = [" ".join(systems), *found[0][0].notes]
    write_comparison_report(args.out / "report.html", names, differences, [part[1] for part in found], notes, command)
    print(f"\n{'figure':<62} {'A':>10} {'B':>10} {'B - A [95 % interval in pairs]':>32}")
    for row in differences:
        first, second = format_value(row["first"]), format_value(row["second"])
        change = shown(row["difference"], row["interval"])
        print(f"{row['label']:<62} {first:>10} {second:>10} {change:>32}  {verdict(row['interval'])}")
    print(f"\n{args.out / 'report.html'}")


if __name__ == "__main__":
    main()

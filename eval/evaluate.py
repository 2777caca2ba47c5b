"""Generate images for some captions of a data set, measure them, and report; or compare two pipelines.

    python eval/evaluate.py --pipeline runs/openmoji/pipeline --data data/openmoji --split train --max-samples 480 \\
        --num-images 64 --clip runs/openmoji/clip --out runs/openmoji/evaluation
    python eval/evaluate.py --compare runs/a/pipeline runs/b/pipeline+runs/b/lora --data ... --out runs/comparison
    python eval/evaluate.py --compare runs/a/pipeline runs/a/pipeline --decoding plain gsd+int8 --data ... --out runs/fast

    python eval/evaluate.py --protocol adm-50k --pipeline PIPELINE --reference VIRTUAL_imagenet256_labeled.npz \\
        --inception weights-inception-2015-12-05-6726825d.pth --recipe npp_c2i_b --out runs/adm

The folder gets `metrics.json` (metrics, 95 % intervals, the recipe of each, and the run), `values.json` (what
`compare.py` compares in pairs with those of another folder), `report.html`,
`generated/NNN.png`, `samples.png` (every generated image with its caption) and `comparison.png` (real, through the
tokenizer, generated). Run again, it keeps images and features that are there. `accelerate launch` shares the work.
With `--compare`, `a/` and `b/` get these files, and the folder the differences in pairs. With `--protocol adm-50k` it
gets `metrics.json`, `report.html`, `generated/NNNNN.png` and `generated.npz`: FID, sFID, Inception Score, precision and
recall as papers of class-conditional ImageNet report them.
"""

import argparse
import shlex
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from unified import UnifiedPipeline
from unified.data import SkipReport
from unified.data.crops import fit
from unified.decoding import DECODING_MODES
from unified.decoding.config import check_decoding
from unified.errors import explain_errors
from unified.files import write_json
from unified.lora.base import base_of
from unified.pipeline.options import GenerationOptions
from unified.registry import add_import_argument, import_extensions
from unified_eval.adm import FULL
from unified_eval.adm_protocol import check_adm_arguments, evaluate_adm
from unified_eval.command_line import (
    add_column_arguments,
    add_generation_arguments,
    check_counts,
    check_folder,
    check_sampling,
    plain_settings,
    sampling_of,
)
from unified_eval.diversity import nearest_neighbours
from unified_eval.evaluation_report import (
    Neighbour,
    comparison_sheet,
    print_differences,
    print_results,
    sample_sheet,
    write_comparison_report,
    write_evaluation_report,
)
from unified_eval.extraction import process_state
from unified_eval.features import EXTRACTORS
from unified_eval.files import write_image
from unified_eval.generation import check_prompts, generate_images, load_system, square_side
from unified_eval.inputs import Inputs, load_networks
from unified_eval.metrics import (
    DEFAULT_METRICS,
    METRICS,
    check_metrics,
    describe_metrics,
    measure_images,
    needs_of,
)
from unified_eval.npz import save_npz
from unified_eval.recipe_cards import add_recipe_argument, check_resolution, parse_with_recipe, recipe_note
from unified_eval.reconstruction import add_tokenizer_psnr, reconstruct, stream_reconstructions
from unified_eval.results import VALUES, Results, SmallSampleWarning, compare_results
from unified_eval.selection import Row, choose_evenly, choose_usable, first_usable_rows, unique_captions, usable_images
from unified_eval.shapes import check_size, read_claims

INT8 = "+int8"
PROTOCOLS = ("captions", "adm-50k")
PIPELINES = "of the pipeline"  # the decoding mode, where none is given
DECODING = [mode + weights for mode in DECODING_MODES for weights in ("", INT8)]


class System(NamedTuple):
    """A pipeline, possibly with an adapter, its decoding mode and the folder of its results."""

    pipeline: str
    lora: str | None
    decoding: str | None  # None: the pipeline's default
    out: Path


class Task(NamedTuple):
    """The captions that every system generates, and the rows that it is measured against."""

    samples: int
    chosen: list[Row]
    others: list[Row]
    training: list[Row]
    claims: list[Any] | None
    tags: list[str] | None


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    argv = import_extensions(argv)
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=f"metrics:\n{describe_metrics()}", formatter_class=argparse.RawDescriptionHelpFormatter
    )  # fmt: skip
    add_import_argument(parser)
    task = parser.add_argument_group("systems and data")
    systems = task.add_mutually_exclusive_group(required=True)
    systems.add_argument("--pipeline", help="pipeline folder, or its name on the Hub")
    systems.add_argument(
        "--compare", nargs=2, metavar=("A", "B"), help="two pipelines, each possibly with an adapter: PIPELINE+LORA"
    )
    systems.add_argument("--images", help="adm-50k: a folder of images or an .npz file, in place of a pipeline")
    task.add_argument(
        "--protocol", choices=PROTOCOLS, default=PROTOCOLS[0],
        help="captions: images of captions of a data set, against its real images; adm-50k: 50,000 images against a reference "
        "batch of ADM (default: %(default)s)",
    )  # fmt: skip
    add_recipe_argument(task)
    task.add_argument(
        "--reference", type=Path, help="adm-50k: reference batch, ADM's .npz with images, statistics or both"
    )
    task.add_argument("--lora", help="LoRA adapter folder to load into --pipeline")
    task.add_argument(
        "--data",
        help="data folder, file or Hub name with captioned images; adm-50k: its captions, in place of class labels",
    )
    task.add_argument("--split", default="train", help="split of the captions and real images (default: %(default)s)")
    task.add_argument(
        "--max-samples", type=int, help="use the first this many captioned rows of the split (default: all)"
    )
    task.add_argument(
        "--num-images", type=int,
        help="captions chosen evenly among them (default: 64); adm-50k: images in all (default: 50000)",
    )  # fmt: skip
    task.add_argument(
        "--samples-per-caption", type=int, default=1, help="images for each caption (default: %(default)s)"
    )
    task.add_argument("--training-split", default="train", help="split searched for neighbours (default: %(default)s)")
    task.add_argument("--psnr-data", help="data for the tokenizer's PSNR (default: that of --data)")
    task.add_argument(
        "--psnr-split",
        default="validation",
        help="split for the tokenizer's PSNR; 'none' skips it (default: %(default)s)",
    )
    add_column_arguments(task)
    measure = parser.add_argument_group("measurement")
    measure.add_argument(
        "--metrics", nargs="+", choices=METRICS, default=list(DEFAULT_METRICS), metavar="NAME",
        help=f"some of the metrics below (default: {' '.join(DEFAULT_METRICS)})",
    )  # fmt: skip
    measure.add_argument(
        "--clip",
        help="CLIP folder, open_clip 'architecture/tag', or 'hf-hub:owner/name'; only some metrics need it",
    )
    measure.add_argument(
        "--extractor", choices=EXTRACTORS, default=EXTRACTORS[0], help="feature network (default: %(default)s)"
    )
    measure.add_argument(
        "--inception-weights",
        "--inception",
        type=Path,
        help="weights file of the inception extractor, 'is' and adm-50k",
    )
    measure.add_argument(
        "--resamples", type=int, default=200,
        help="resamples of the prompts for intervals of distances, 0 for none (default: %(default)s)",
    )  # fmt: skip
    measure.add_argument("--features", type=Path, help="folder of cached features (default: features/ in --out)")
    generation = parser.add_argument_group("generation")
    add_generation_arguments(generation)
    generation.add_argument(
        "--decoding", nargs="+", choices=DECODING, default=[None], metavar="MODE",
        help=f"one of {', '.join(DECODING)}; with --compare one for both or one for each (default: the pipeline's)",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, required=True, help="folder to write; earlier results in it are replaced")
    parser.add_argument("--npz", action="store_true", help="also write generated.npz for the evaluator of ADM")
    args = parse_with_recipe(parser, argv)
    if args.num_images is None:
        args.num_images = FULL if args.protocol == "adm-50k" else 64
    return args


def check_arguments(args: argparse.Namespace) -> None:
    """Raise ValueError for mistakes that the arguments alone show."""
    check_counts(args, "batch_size", "samples_per_caption", "num_images")
    check_sampling(args)
    check_folder("out", args.out)
    check_folder("features", args.features)
    if args.protocol == "adm-50k":
        check_adm_arguments(args)
        return
    if args.images or args.reference:
        raise ValueError("--images, --reference: they are for --protocol adm-50k.")
    if not args.data:
        raise ValueError("--data: missing; give a data folder, file or Hub name with captioned images.")
    if args.resamples < 0 or args.resamples == 1:
        raise ValueError(f"--resamples: {args.resamples} gives no interval; give 2 or more, or 0 for none.")
    needs_weights = args.extractor == "inception" or "logits_extractor" in needs_of(args.metrics)
    if args.inception_weights is not None and not needs_weights:
        raise ValueError(f"--inception-weights is for --extractor inception, not {args.extractor}.")
    if args.lora and args.compare:
        raise ValueError("--lora is for --pipeline; with --compare write PIPELINE+LORA.")
    given = {"extractor", "logits_extractor", "training", "claims"}
    given |= {"clip"} if args.clip else set()
    given |= {"samples_per_caption"} if args.samples_per_caption > 1 else set()
    check_metrics(args.metrics, given, args.num_images)


def systems_of(args: argparse.Namespace) -> list[System]:
    """The one or two systems of a command line."""
    if not args.compare:
        names, folders = [(args.pipeline, args.lora)], [args.out]
    else:
        names, folders = [pipeline_and_lora(name) for name in args.compare], [args.out / "a", args.out / "b"]
    if len(args.decoding) not in (1, len(names)):
        raise ValueError(f"--decoding: {len(args.decoding)} modes for {len(names)} pipeline(s).")
    modes = (args.decoding * len(names))[: len(names)]
    return [System(name, lora, mode, out) for (name, lora), mode, out in zip(names, modes, folders, strict=True)]


def pipeline_and_lora(name: str) -> tuple[str, str | None]:
    """The parts of ``PIPELINE+LORA``; a folder may have a plus in its name."""
    if Path(name).exists() or "+" not in name:
        return name, None
    pipeline, _, lora = name.rpartition("+")
    return pipeline, lora


def say(text: str) -> None:
    """Print once, whatever the number of processes."""
    if process_state().is_main_process:
        print(text)


def choose_task(args: argparse.Namespace) -> Task:
    """Choose rows by their captions; no image is kept."""
    columns = {"image_column": args.image_column, "caption_column": args.caption_column}

    def read(source: str, split: str, most: int | None = None) -> list[Row]:
        rows, report = first_usable_rows(source, split, most, **columns)
        say(f"{source} [{split}]: {len(rows)} rows with captions, {report.skipped} without")
        return rows

    rows = read(args.data, args.split, args.max_samples)
    distinct = unique_captions(rows)
    if len(distinct) < len(rows):
        say(f"  {len(rows) - len(distinct)} rows with a repeated caption left out")
    chosen = choose_usable(distinct, args.num_images, args.seed)
    numbers = {row.row for row in chosen}
    corrupt = [row.row for row in choose_evenly(distinct, args.num_images, args.seed) if row.row not in numbers]
    if corrupt:
        say(f"  in place of rows {corrupt}, whose images are corrupt, others are taken")
    try:
        others = choose_usable([row for row in distinct if row.row not in numbers], args.num_images, args.seed)
    except ValueError:  # there are not as many
        others = []
    needs, training = needs_of(args.metrics), []
    if "training" in needs:
        training = rows if args.training_split == args.split else read(args.data, args.training_split)
    if args.psnr_split != "none":
        read(args.psnr_data or args.data, args.psnr_split)
    claims = tags = None
    if "claims" in needs:
        extra = [row.extra for row in chosen]
        if not {"include", "tag"} <= set(extra[0]):
            raise ValueError(f"metrics: claims need the columns include and tag, which {args.data!r} lacks.")
        claims, tags = [read_claims(part["include"]) for part in extra], [part["tag"] for part in extra]
    return Task(len(rows), chosen, others, training, claims, tags)


def open_pipeline(system: System, device: str) -> tuple[UnifiedPipeline, dict[str, str]]:
    """Load a system; return it with the hashes that identify it. Raises ValueError if its decoding does not suit its order."""
    pipeline, identity = load_system(system.pipeline, system.lora)
    given = None if system.decoding is None else system.decoding.removesuffix(INT8)
    decoding = GenerationOptions(decoding=given).filled(pipeline.sampling).decoding
    check_decoding(str(decoding), base_of(pipeline.model).config)
    pipeline.to(device)
    if system.decoding is not None and system.decoding.endswith(INT8):
        identity["weights"] = "int8"
        pipeline.enable_fast_decoding(int8=True)
    return pipeline, identity


def evaluate(args: argparse.Namespace, task: Task, system: System, networks: dict[str, Any]) -> tuple[Inputs, Results]:
    """Generate, measure and write the results of one system."""
    columns = {"image_column": args.image_column, "caption_column": args.caption_column}
    progress = process_state().is_main_process

    # 1. Open the pipeline and check the captions; crop the chosen images to its size and pass them through its tokenizer.
    pipeline, identity = open_pipeline(system, args.device)
    check_resolution(args.recipe, pipeline.default_size)
    check_prompts(pipeline, [row.caption for row in task.chosen])
    side, tokenizer = square_side(pipeline), pipeline.image_tokenizer
    if task.claims is not None:
        check_size(side, side)
    captions = [row.caption for row in task.chosen]
    real, others = ([fit(row.image, side) for row in rows] for rows in (task.chosen, task.others))
    rebuilt = reconstruct(tokenizer, real, args.batch_size)

    # 2. Generate.
    sampling = sampling_of(args, pipeline.sampling)
    decoding = system.decoding or pipeline.sampling.get("decoding", "plain")
    generated, times = generate_images(
        pipeline, captions, system.out / "generated", args.samples_per_caption, args.seed, args.batch_size,
        sampling | {"decoding": decoding.removesuffix(INT8)}, identity, progress=True,
    )  # fmt: skip

    # 3. Measure. Training images and those for the tokenizer's PSNR stream by.
    seen: list[int] = []  # numbers of the training rows, in the order of their features

    def training_images() -> Iterator[Image.Image]:
        for row in usable_images(args.data, args.training_split, **columns):
            if row.row > task.training[-1].row:
                break
            seen.append(row.row)
            yield fit(row.image, side)

    through = (again for _, again in stream_reconstructions(tokenizer, training_images(), args.batch_size, progress))
    inputs = Inputs(
        captions, real, rebuilt, generated, other_real=others or None, training=through if task.training else None,
        claims=task.claims, tags=task.tags, batch_size=args.batch_size, cache=args.features or system.out / "features",
        progress=progress, **networks,
    )  # fmt: skip
    results = measure_images(inputs, args.metrics, resamples=args.resamples, seed=args.seed)
    results.notes += recipe_note(args.recipe)
    if args.psnr_split != "none":
        source, report = args.psnr_data or args.data, SkipReport()
        held_out = usable_images(source, args.psnr_split, **columns, report=report)
        squares = (fit(row.image, side) for row in held_out)
        reference = f"split {args.psnr_split} of {source}"
        add_tokenizer_psnr(results, tokenizer, squares, reference, args.batch_size, progress)
        say(f"{source} [{args.psnr_split}]: {report.summary()}")

    # 4. Write.
    run = {
        **plain_settings(args), **sampling, "pipeline": system.pipeline, "lora": system.lora, "decoding": decoding, **identity,
        "samples": task.samples, "rows": [row.row for row in task.chosen], "captions": captions,
        "image_size": [side, side], **times,
        "versions": {name: version(name) for name in ("torch", "open-clip-torch", "pillow")},
    }  # fmt: skip
    if process_state().is_main_process:
        rows = {row.row: row for row in task.training}
        neighbours = nearest_training_images(pipeline, inputs, [rows[number] for number in seen]) if seen else []
        write_results(system.out, args.npz, inputs, results, run, neighbours)
    return replace(inputs, training=None), results  # without features


def nearest_training_images(
    pipeline: UnifiedPipeline, inputs: Inputs, training: Sequence[Row], most: int = 8
) -> list[Neighbour]:
    """The generated images that are nearest to a training image, nearest first; ``training`` are the rows of its features."""
    found, distances = nearest_neighbours(inputs.features("generated"), inputs.features("training"))
    order = sorted(range(len(found)), key=lambda number: distances[number, 0])[:most]
    rows = [training[found[number, 0]] for number in order]
    images = reconstruct(pipeline.image_tokenizer, [fit(row.image, square_side(pipeline)) for row in rows])
    return [
        Neighbour(number, image, row.caption, float(distances[number, 0]))
        for number, image, row in zip(order, images, rows, strict=True)
    ]


def write_results(
    out: Path, npz: bool, inputs: Inputs, results: Results, run: dict[str, Any], neighbours: list[Neighbour]
) -> None:
    """Write `metrics.json`, the sheets and the report, and print the metrics."""
    write_json(out / "metrics.json", {**results.result(), "run": run})
    results.save(out / VALUES)
    write_image(out / "samples.png", sample_sheet(inputs, run["seed"]))
    write_image(out / "comparison.png", comparison_sheet(inputs))
    if npz:
        save_npz(out / "generated.npz", inputs.generated)
    title = f"Evaluation of {run['pipeline']}" + (f" with {run['lora']}" if run["lora"] else "")
    command = shlex.join(["python", *sys.argv])
    write_evaluation_report(out / "report.html", title, inputs, results, run, neighbours, command)
    print_results(results)
    print(f"\n{out / 'metrics.json'}\n{out / 'report.html'}")


def write_comparison(
    args: argparse.Namespace, systems: list[System], inputs: list[Inputs], results: list[Results]
) -> None:
    """Write `metrics.json` and the report of the differences of two systems, and print them."""
    differences = compare_results(*results)
    run = {"a": args.compare[0], "b": args.compare[1], "decoding": [system.decoding or PIPELINES for system in systems],
           "num_images": args.num_images, "seed": args.seed, "recipe": args.recipe}  # fmt: skip
    notes = list(dict.fromkeys(note for part in results for note in part.notes))
    write_json(args.out / "metrics.json", {"differences": differences, "run": run, "notes": notes})
    names = ["A", "B"]
    described = " ".join(
        f"{name}: {given}, decoding {system.decoding or PIPELINES}."
        for name, given, system in zip(names, args.compare, systems, strict=True)
    )
    command = shlex.join(["python", *sys.argv])
    write_comparison_report(args.out / "report.html", names, differences, inputs, [described, *notes], command)
    print_differences(differences)
    print(f"\n{args.out / 'report.html'}")


def main(argv: Sequence[str] | None = None) -> None:
    """Evaluate one pipeline, or two and their differences."""
    # 1. Read the command line and check it.
    args = parse_arguments(argv)
    check_arguments(args)
    systems = systems_of(args)
    if args.protocol == "adm-50k":
        evaluate_adm(args, lambda: open_pipeline(systems[0], args.device))
        return
    warnings.simplefilter("ignore", SmallSampleWarning)  # they are printed as notes

    # 2. Choose captions and rows, load the networks, and see whether the second pipeline of a comparison can be opened.
    task = choose_task(args)
    networks = load_networks(needs_of(args.metrics), args.clip, args.extractor, args.inception_weights, args.device)
    for system in systems[1:]:
        pipeline = open_pipeline(system, args.device)[0]
        square_side(pipeline)
        check_prompts(pipeline, [row.caption for row in task.chosen])

    # 3. Generate and measure.
    found = [evaluate(args, task, system, networks) for system in systems]

    # 4. Compare.
    if args.compare and process_state().is_main_process:
        write_comparison(args, systems, [inputs for inputs, _ in found], [results for _, results in found])


if __name__ == "__main__":
    explain_errors(main)

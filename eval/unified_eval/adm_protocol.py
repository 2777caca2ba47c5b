"""A run of the protocol adm-50k: images generated or taken as they are, streamed, measured and reported."""

import argparse
import shlex
import sys
from collections.abc import Callable, Iterable
from functools import partial
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from unified import UnifiedPipeline
from unified.files import write_json
from unified_eval.adm import EVALUATOR, NEIGHBOUR, Reference, measure_adm, open_reference
from unified_eval.command_line import SAMPLING, plain_settings, sampling_of
from unified_eval.evaluation_report import print_results, shown
from unified_eval.extraction import extract_features, open_images, process_state
from unified_eval.features import ADM_EXTRACTOR, EXTRACTORS, load_extractor
from unified_eval.files import content_hash
from unified_eval.generation import balanced_labels, check_prompts, class_count, generate_files
from unified_eval.metrics import DEFAULT_METRICS
from unified_eval.npz import LazyImage, load_npz, npz_shape, opened, save_npz
from unified_eval.recipe_cards import check_resolution, recipe_note
from unified_eval.report import write_report
from unified_eval.results import Results, recipe_line
from unified_eval.selection import choose_evenly, first_usable_rows, unique_captions
from unified_eval.sheets import captioned_grid, in_rows
from unified_tokenizers.images import read_image

SHOWN = 64  # images on the sheet
# Arguments that decide the values: always, and where images are generated.
SETTINGS = ("protocol", "images", "reference", "inception_weights", "num_images", "batch_size", "device", "out")
SAMPLED = ("pipeline", "lora", "recipe", "data", "split", "max_samples", "image_column", "caption_column", "samples_per_caption",
           "seed", "decoding", *SAMPLING)  # fmt: skip
Size = tuple[int, int]


class ImageSet(NamedTuple):
    """Images that are opened one at a time: how many, their height and width, and how to go through them."""

    number: int
    size: Size
    stream: Callable[[], Iterable[LazyImage]]


def check_adm_arguments(args: argparse.Namespace) -> None:
    """Raise ValueError for what the protocol lacks or cannot use."""
    if args.compare:
        raise ValueError("--compare: the protocol adm-50k measures one --pipeline or --images.")
    if not args.reference:
        raise ValueError("--reference: missing; give a reference batch, such as ADM's VIRTUAL_imagenet256_labeled.npz.")
    if not args.inception_weights:
        raise ValueError(
            "--inception: missing; FID and Inception Score are of the Inception network: give its weights (eval/README.md "
            "says which file), or take --protocol captions, whose default extractor comes along."
        )
    own = {"metrics": list(DEFAULT_METRICS), "extractor": EXTRACTORS[0], "clip": None, "psnr_data": None}
    for name, default in own.items():
        if getattr(args, name) != default:
            raise ValueError(
                f"--{name.replace('_', '-')}: the protocol adm-50k has its own metrics and network; leave it out."
            )
    if args.images and (args.data or args.lora or args.recipe or args.samples_per_caption > 1):
        raise ValueError(
            "--images: are measured as they are; leave out --data, --lora, --recipe and --samples-per-caption."
        )
    if args.images and args.npz and args.images.endswith(".npz"):
        raise ValueError(f"--npz: {args.images!r} is such a file already.")
    if args.num_images <= NEIGHBOUR:
        raise ValueError(f"--num-images: {args.num_images}; precision and recall need more than {NEIGHBOUR}.")
    if args.num_images % args.samples_per_caption:
        raise ValueError(
            f"--samples-per-caption: {args.samples_per_caption} does not divide the {args.num_images} of --num-images."
        )


def evaluate_adm(args: argparse.Namespace, open_pipeline: Callable[[], tuple[UnifiedPipeline, dict[str, str]]]) -> None:
    """Generate, measure and write. Images stream by; only their features, about 20 KB an image, stay in memory.

    Args:
        args: the arguments of `evaluate.py`.
        open_pipeline: loads the pipeline, and returns it with the hashes that identify it.

    Raises:
        ValueError: for arguments, files or images that do not fit.
    """
    # 1. Open what is compared, before anything is generated.
    reference = open_reference(args.reference)
    network = load_extractor(ADM_EXTRACTOR, args.inception_weights, args.device)

    # 2. Generate, or take images that are there.
    if args.images:
        images, titles, facts = image_set(args.images), list[str](), {"images_sha256": content_hash(args.images)}
    else:
        pipeline, identity = open_pipeline()
        check_resolution(args.recipe, pipeline.default_size)
        check_size(pipeline.default_size, reference)
        images, titles, facts = generate(args, pipeline, identity)
    check_size(images.size, reference)
    if images.number != args.num_images:
        raise ValueError(f"--num-images: {args.num_images}, but {args.images!r} has {images.number}; give that number.")

    # 3. Measure. Processes share the forward passes; the first one does the rest.
    first = process_state().is_main_process
    settings = (args.batch_size, args.features or args.out / "features", first, np.float32)
    rows = extract_features(network, images.stream(), *settings)
    real = None if reference.images is None else extract_features(network, load_npz(reference.path), *settings)
    if not first:
        return
    results = measure_adm(rows, real, reference, network, images.size, args.device)
    results.notes += recipe_note(args.recipe)

    # 4. Write.
    used = SETTINGS if args.images else SETTINGS + SAMPLED
    run = {
        **{name: value for name, value in plain_settings(args).items() if name in used}, **facts,
        "image_size": list(images.size), "evaluator": EVALUATOR,
        "versions": {name: version(name) for name in ("torch", "torch-fidelity", "pillow")},
    }  # fmt: skip
    if args.images and args.npz:
        save_npz(args.out / "generated.npz", list(images.stream()))
    write(args.out, results, run, images, titles)


def generate(
    args: argparse.Namespace, pipeline: UnifiedPipeline, identity: dict[str, str]
) -> tuple[ImageSet, list[str], dict[str, Any]]:
    """Generate the images, keep those that are there, and write them to `generated.npz`.

    Returns:
        The images, captions or classes of the first of them, and the facts of the run.
    """
    prompts, out = prompts_of(args, pipeline), args.out / "generated.npz"
    decoding = args.decoding[0] or pipeline.sampling.get("decoding", "plain")
    sampling = sampling_of(args, pipeline.sampling) | {"decoding": decoding.partition("+")[0]}
    files, times = generate_files(
        pipeline, prompts, args.out / "generated", args.samples_per_caption, args.seed, args.batch_size, sampling, identity,
        progress=True, file_name="{:05d}.png".format,
    )  # fmt: skip
    facts = {**identity, **times, **sampling, "decoding": decoding}
    each = [prompt for prompt in prompts for _ in range(args.samples_per_caption)]
    labels = None if args.data else np.array(each, dtype=np.int64)
    if labels is not None:
        counts = np.bincount(labels, minlength=class_count(pipeline))
        facts["images_per_class"] = [int(counts.min()), int(counts.max())]
    state = process_state()
    if state.is_main_process:
        save_npz(out, [partial(read_image, file) for file in files], labels)
    state.wait_for_everyone()
    return image_set(out), [str(prompt) for prompt in each[:SHOWN]], facts


def prompts_of(args: argparse.Namespace, pipeline: UnifiedPipeline) -> list[str] | list[int]:
    """The captions of --data, or the class labels of a class-conditional pipeline, each about equally often."""
    count = args.num_images // args.samples_per_caption
    if not args.data:
        return balanced_labels(count, class_count(pipeline))
    columns = {"image_column": args.image_column, "caption_column": args.caption_column}
    rows = unique_captions(first_usable_rows(args.data, args.split, args.max_samples, **columns)[0])
    if len(rows) < count:
        raise ValueError(
            f"--num-images: {count} captions are needed, {args.data!r} has {len(rows)}; give fewer images or more "
            "--samples-per-caption."
        )
    captions = [row.caption for row in choose_evenly(rows, count, args.seed)]
    check_prompts(pipeline, captions)
    return captions


def image_set(source: str | Path) -> ImageSet:
    """The images of a folder or of an `.npz` file. Raises ValueError if it is neither, or has no image."""
    source = Path(source)
    if source.suffix == ".npz":
        shape = npz_shape(source)
        if shape is None:
            raise ValueError(f"--images: {str(source)!r} has no arr_0.")
        return ImageSet(shape[0], shape[1:], lambda: load_npz(source))
    if not source.is_dir():
        raise ValueError(f"--images: {str(source)!r} is neither a folder of images nor an .npz file.")
    images = list(open_images(source))
    first = opened(images[0])
    return ImageSet(len(images), (first.height, first.width), lambda: images)


def check_size(size: Size, reference: Reference) -> None:
    """Raise ValueError if images have another height and width than those of the reference batch."""
    if reference.images is not None and reference.images[1:] != size:
        height, width = reference.images[1:]
        raise ValueError(
            f"--reference: its images are {height}x{width}, those to measure {size[0]}x{size[1]}; take a batch of that size, "
            "or resize the images as their paper did and give them with --images."
        )


def write(out: Path, results: Results, run: dict[str, Any], images: ImageSet, titles: list[str]) -> None:
    """Write `metrics.json` and the report, and print the values."""
    write_json(out / "metrics.json", {**results.result(), "run": run})
    some = [opened(image).convert("RGB") for image in islice(images.stream(), SHOWN)]
    sheet = captioned_grid(in_rows(some, 8), in_rows(titles, 8) if titles else None)
    write_report(
        out / "report.html",
        f"{run['images'] or run['pipeline']}, protocol {run['protocol']}",
        metrics=[(value.recipe["label"], shown(value.number, value.interval), recipe_line(value.recipe))
                 for value in results.values.values()],
        tables={"Run": [{"setting": name, "value": str(value)} for name, value in run.items()]},
        images=[(sheet, f"The first {len(some)} images; none was selected.")],
        commands=[shlex.join(["python", *sys.argv])],
        notes=results.notes,
    )  # fmt: skip
    print_results(results)
    print(f"\n{out / 'metrics.json'}\n{out / 'report.html'}")

"""Generation of the images that are measured: each from its own seed, resumable, shared among processes."""

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tqdm import tqdm

from unified import UnifiedPipeline
from unified.files import write_json
from unified.lora.base import base_of
from unified.pipeline.arguments import as_prompts, check_room, code_grid
from unified.pipeline.metadata import describe_images
from unified_eval.extraction import batches, process_state
from unified_eval.files import content_hash, write_image
from unified_tokenizers.images import read_image


def load_system(name: str, lora: str | None = None) -> tuple[UnifiedPipeline, dict[str, str]]:
    """A pipeline, perhaps with an adapter, and the hashes that identify both for :func:`generate_images`."""
    pipeline, identity = UnifiedPipeline.from_pretrained(name), {"pipeline_sha256": content_hash(name)}
    if lora:
        pipeline.load_lora_weights(lora)
        identity["lora_sha256"] = content_hash(lora)
    return pipeline, identity


def square_side(pipeline: UnifiedPipeline) -> int:
    """Side in pixels of the images of a pipeline. Raises ValueError if they are no squares."""
    height, width = pipeline.default_size
    if height != width:
        raise ValueError(
            f"pipeline: generates {height}x{width} images; real ones are cropped to squares to be compared."
        )
    return width


def class_count(pipeline: UnifiedPipeline) -> int:
    """How many classes a class-conditional pipeline has. Raises ValueError if it has none."""
    labels = getattr(pipeline, "labels", None)
    if not labels:
        raise ValueError("pipeline: has no class labels; give captions with --data.")
    return len(labels)


def balanced_labels(count: int, classes: int) -> list[int]:
    """Labels of ``count`` images, in turn, so that any run of them has each class about equally often.

    The Inception Score is taken in runs of images, so that labels in order would lower it.
    """
    return [number % classes for number in range(count)]


def check_prompts(pipeline: UnifiedPipeline, prompts: Sequence[str] | Sequence[int], **sampling: Any) -> None:
    """Raises ValueError if the pipeline cannot generate one of many prompts, which would show when its batch is reached."""
    if prompts and isinstance(prompts[0], int):
        classes = class_count(pipeline)
        wrong = [label for label in prompts if not (isinstance(label, int) and 0 <= label < classes)]
        if wrong:
            raise ValueError(f"prompts: label {wrong[0]!r} is none of 0 to {classes - 1}.")
        return
    captions: list[Any] = list(prompts)
    config, stride = base_of(pipeline.model).config, pipeline.image_tokenizer.downsample
    grid = code_grid(config, stride, sampling.get("height"), sampling.get("width"))
    check_room(as_prompts(captions) if captions else [], pipeline.text_tokenizer, config, grid, "prompt")


def call_pipeline(pipeline: Any, prompts: list[Any], **options: Any) -> list[Image.Image]:
    """An image for each caption, or for each class label of a class-conditional pipeline."""
    if isinstance(prompts[0], int):
        return pipeline(class_labels=prompts, **options).images
    return pipeline(prompts, **options).images


def stream_images(
    pipeline: UnifiedPipeline,
    prompts: Sequence[str] | Sequence[int],
    seeds: Sequence[int],
    batch_size: int = 64,
    **sampling: Any,
) -> Iterator[Image.Image]:
    """Generate an image for each prompt, batch by batch; each depends on its own seed only, not on its batch.

    Args:
        pipeline: the pipeline; its progress bar is switched off.
        prompts: one for each image; captions, or class labels.
        seeds: one for each image.
        batch_size: images generated at once.
        sampling: arguments of the pipeline, such as ``guidance_scale``.

    Raises:
        ValueError: if the lists differ in length, or as for the pipeline.
    """
    check_prompts(pipeline, prompts, **sampling)
    pipeline.set_progress_bar_config(disable=True)
    for pairs in batches(zip(prompts, seeds, strict=True), batch_size):
        generators = [torch.Generator().manual_seed(seed) for _, seed in pairs]
        yield from call_pipeline(pipeline, [prompt for prompt, _ in pairs], generator=generators, **sampling)


def generate_images(
    pipeline: UnifiedPipeline, captions: Sequence[str], folder: str | Path, *arguments: Any, **options: Any
) -> tuple[list[Image.Image], dict[str, Any]]:
    """Generate files as :func:`generate_files` does, and return all images in memory in place of the files."""
    files, times = generate_files(pipeline, captions, folder, *arguments, **options)
    return [read_image(file) for file in files], times


def generate_files(
    pipeline: UnifiedPipeline,
    captions: Sequence[str] | Sequence[int],
    folder: str | Path,
    samples: int = 1,
    seed: int = 0,
    batch_size: int = 64,
    sampling: Mapping[str, Any] | None = None,
    identity: Mapping[str, str] | None = None,
    progress: bool = False,
    file_name: Callable[[int], str] = "{:03d}.png".format,
) -> tuple[list[Path], dict[str, Any]]:
    """Generate ``samples`` images for each caption into a folder, or continue an earlier call that was interrupted.

    Image i, for caption ``i // samples``, has the seed ``seed + i`` and the file ``file_name(i)``. If captions, seeds,
    sampling and ``identity`` are those of the ``.json`` beside the folder, the images that are there are kept; else they
    are removed. Under ``accelerate launch`` every process generates its share, and all return all files. One batch of
    images is in memory at a time.

    Args:
        pipeline: the pipeline.
        captions: N captions, or class labels.
        folder: folder to write.
        samples: images for each caption.
        seed: seed of the first image.
        batch_size: images generated at once.
        sampling: arguments of the pipeline.
        identity: tells this pipeline from others, such as the :func:`unified_eval.content_hash` of its folder.
        progress: show a progress bar.
        file_name: maps i to a name in the folder that begins with a digit; ``NNN.png`` without it.

    Returns:
        The N * samples files, those of a caption adjacent; and ``generated`` (by this process, now), ``kept`` and
        ``seconds_per_image`` (of this process; None if it generated none).

    Raises:
        ValueError: if ``samples`` or ``batch_size`` is below 1, or as for the pipeline.
    """
    if samples < 1 or batch_size < 1:
        raise ValueError(f"samples, batch_size: {samples} and {batch_size}; give 1 or more.")
    folder, sampling = Path(folder), dict(sampling or {})
    prompts: list[Any] = [caption for caption in captions for _ in range(samples)]
    files = [folder / file_name(number) for number in range(len(prompts))]
    settings = {"captions": list(captions), "samples": samples, "seed": seed, "sampling": sampling, **(identity or {})}
    state = process_state()
    if state.is_main_process:
        _prepare(folder, settings)
    state.wait_for_everyone()
    missing = [number for number, file in enumerate(files) if not file.is_file()]
    state.wait_for_everyone()  # before anybody writes
    mine = missing[state.process_index :: state.num_processes]
    start = time.perf_counter()
    stream = stream_images(pipeline, [prompts[n] for n in mine], [seed + n for n in mine], batch_size, **sampling)
    hidden = not progress or not state.is_main_process
    for number, image in tqdm(zip(mine, stream, strict=True), "generate", len(mine), unit="image", disable=hidden):
        describe_images(pipeline, [image], [prompts[number]], [seed + number], sampling)
        write_image(files[number], image)
    seconds = (time.perf_counter() - start) / len(mine) if mine else None
    state.wait_for_everyone()
    return files, {"generated": len(mine), "kept": len(files) - len(missing), "seconds_per_image": seconds}


def geneval_name(samples: int) -> Callable[[int], str]:
    """Names of images as GenEval's evaluator expects them: ``00007/samples/00002.png``."""
    return lambda number: f"{number // samples:05d}/samples/{number % samples:05d}.png"


def _prepare(folder: Path, settings: dict[str, Any]) -> None:
    """Keep images of equal settings, remove others, and write down the settings."""
    record = folder.with_name(folder.name + ".json")  # beside, so that the folder holds images alone
    folder.mkdir(parents=True, exist_ok=True)
    settings = json.loads(json.dumps(settings))
    if record.is_file() and json.loads(record.read_text(encoding="utf-8")) == settings:
        return
    record.unlink(missing_ok=True)
    for old in folder.rglob("[0-9]*.png"):
        old.unlink()
    write_json(record, settings)

"""Drawing the images that are measured: seeded one by one, resumable, shared among processes."""

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from tqdm import tqdm

from unified_eval.extraction import batches, process_state
from unified_eval.features import file_sha256

if TYPE_CHECKING:
    from unified import UnifiedPipeline


def stream_drawings(
    pipeline: "UnifiedPipeline", prompts: Sequence[str], seeds: Sequence[int], batch_size: int = 64, **sampling: Any
) -> Iterator[Image.Image]:
    """Yield an image for each prompt, batch by batch; each depends on its own seed only, not on its batch.

    Args:
        pipeline: the pipeline; its progress bar is switched off.
        prompts: one for each image.
        seeds: one for each image.
        batch_size: images generated at once.
        sampling: arguments of the pipeline, such as ``guidance_scale``.

    Raises:
        ValueError: if the lists differ in length, or as for the pipeline.
    """
    pipeline.set_progress_bar_config(disable=True)
    for pairs in batches(zip(prompts, seeds, strict=True), batch_size):
        generators = [torch.Generator().manual_seed(seed) for _, seed in pairs]
        yield from pipeline([prompt for prompt, _ in pairs], generator=generators, **sampling).images


def draw_images(
    pipeline: "UnifiedPipeline",
    captions: Sequence[str],
    folder: str | Path,
    samples: int = 1,
    seed: int = 0,
    batch_size: int = 64,
    sampling: Mapping[str, Any] | None = None,
    identity: Mapping[str, str] | None = None,
    progress: bool = False,
    file_name: Callable[[int], str] = "{:03d}.png".format,
) -> tuple[list[Image.Image], dict[str, Any]]:
    """Draw ``samples`` images for each caption into a folder, or continue what an earlier call began there.

    Image i, for caption ``i // samples``, has the seed ``seed + i`` and the file ``file_name(i)``. If captions, seeds,
    sampling and ``identity`` are those of the ``.json`` beside the folder, the images that are there are kept; else they
    are removed. Under ``accelerate launch`` every process samples its share, and all return all images.

    Args:
        pipeline: the pipeline.
        captions: N captions.
        folder: folder to write.
        samples: images for each caption.
        seed: seed of the first image.
        batch_size: images generated at once.
        sampling: arguments of the pipeline.
        identity: what tells this pipeline from others, such as :func:`content_hash` of its folder.
        progress: show a progress bar.
        file_name: maps i to a name in the folder that begins with a digit; ``NNN.png`` without it.

    Returns:
        The N * samples images, those of a caption adjacent; and ``drawn`` (by this process, now), ``kept`` and
        ``seconds_per_picture`` (of this process; None if it sampled none).

    Raises:
        ValueError: if ``samples`` or ``batch_size`` is below 1, or as for the pipeline.
    """
    if samples < 1 or batch_size < 1:
        raise ValueError(f"samples, batch_size: {samples} and {batch_size}; give 1 or more.")
    folder, sampling = Path(folder), dict(sampling or {})
    prompts = [caption for caption in captions for _ in range(samples)]
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
    with tqdm(
        total=len(mine), desc="generate", unit="picture", disable=not progress or not state.is_main_process
    ) as bar:
        drawings = stream_drawings(
            pipeline, [prompts[n] for n in mine], [seed + n for n in mine], batch_size, **sampling
        )
        for number, image in zip(mine, drawings, strict=True):
            files[number].parent.mkdir(parents=True, exist_ok=True)
            beside = files[number].with_suffix(".writing")
            image.save(beside, format="PNG")
            os.replace(beside, files[number])
            bar.update()
    seconds = (time.perf_counter() - start) / len(mine) if mine else None
    state.wait_for_everyone()
    pictures = [Image.open(file).convert("RGB") for file in files]
    return pictures, {"drawn": len(mine), "kept": len(files) - len(missing), "seconds_per_picture": seconds}


def geneval_name(samples: int) -> Callable[[int], str]:
    """Names of images as GenEval's evaluator expects them: ``00007/samples/00002.png``."""
    return lambda number: f"{number // samples:05d}/samples/{number % samples:05d}.png"


def content_hash(path: str | Path) -> str:
    """Hexadecimal SHA-256 of a file, or of the names and contents of all files in a folder; else of the name itself."""
    path = Path(path)
    if path.is_file():
        return file_sha256(path)
    digest = hashlib.sha256()
    if not path.is_dir():
        return hashlib.sha256(str(path).encode()).hexdigest()  # a name on the Hub
    for file in sorted(file for file in path.rglob("*") if file.is_file()):
        digest.update(f"{file.relative_to(path)}\0{file_sha256(file)}\n".encode())
    return digest.hexdigest()


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
    record.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

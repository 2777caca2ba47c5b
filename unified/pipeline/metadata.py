"""What generated PNGs say of themselves: prompt, seed, settings and model, as text chunks of the file."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from peft import PeftModel
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from unified.lora.base import base_of
from unified.lora.switching import adapter_state, is_disabled
from unified.pipeline.options import SAMPLING, GenerationOptions
from unified.pipeline.pipeline import UnifiedPipeline

TEXTS = ("prompt", "negative_prompt", "edit", "model", "software")  # as they are
VALUES = ("prompts", "seed", "settings", "adapters")  # as JSON
SOFTWARE = "unified"


def describe_images(
    pipe: UnifiedPipeline,
    images: Any,
    prompts: Sequence[str],
    seeds: Sequence[int],
    options: Mapping[str, Any],
    negative_prompt: str | None = None,
    edit: str | None = None,
    adapters: Mapping[str, float] | None = None,
) -> None:
    """Attach to images what they were made with; :func:`write_png`, and gradio, write it into their files.

    Args:
        pipe: the pipeline that generated them.
        images: N PIL images.
        prompts, seeds: one for each image.
        options: those of :class:`unified.pipeline.options.GenerationOptions` that were given.
        negative_prompt: what they were steered away from; default: that of the pipeline, if any.
        edit: the method that changed an image, which prompt and seed alone do not give again.
        adapters: weights of the adapters by their names; default: those that are active now.
    """
    filled = GenerationOptions.from_mapping(options).filled(pipe.sampling)
    settings = {name: getattr(filled, name) for name in SAMPLING}
    settings |= {"steer": dict(filled.steer)} if filled.steer else {}
    if negative_prompt is None:
        negative_prompt = pipe.sampling.get("negative_prompt")
    if adapters is None:
        model = pipe.model
        adapters = adapter_state(model).weights if isinstance(model, PeftModel) and not is_disabled(model) else {}
    name = model_name(base_of(pipe.model).name_or_path or "")
    for image, prompt, seed in zip(images, prompts, seeds, strict=True):
        size = {"height": image.height, "width": image.width}
        describe(image, prompt=prompt, negative_prompt=negative_prompt, seed=seed, settings=size | settings, edit=edit,
                 adapters=adapters, model=name)  # fmt: skip


def describe(image: Image.Image, **values: Any) -> None:
    """Attach values to an image under names of :data:`TEXTS` and :data:`VALUES`; None and empty ones are left out."""
    unknown = sorted(values.keys() - {*TEXTS, *VALUES})
    if unknown:
        raise ValueError(f"metadata: {unknown} are none of {(*TEXTS, *VALUES)}.")
    for name, value in {"software": SOFTWARE, **values}.items():
        if value or value == 0:
            image.info[name] = value if name in TEXTS else json.dumps(value, ensure_ascii=False, default=_name)


def write_png(image: Image.Image, file: str | Path | BinaryIO) -> None:
    """Write a PNG with what :func:`describe` has attached to the image, and no other metadata."""
    chunks = PngInfo()
    for name in (*TEXTS, *VALUES):
        if isinstance(image.info.get(name), str):
            chunks.add_text(name, image.info[name])
    image.save(file, format="PNG", pnginfo=chunks)


def read_image_metadata(path: str | Path) -> dict[str, Any]:
    """What a PNG says of itself: ``prompt``, ``negative_prompt``, ``edit``, ``model`` and ``software`` as strings, ``seed`` as a
    number, ``settings`` and ``adapters`` as dicts, a sheet's ``prompts`` as a list; empty for files of other programs.

    With them an image without ``edit`` is generated again: ``pipe(found["prompt"], generator=found["seed"], **found["settings"])``.

    Raises:
        ValueError: if the file is no PNG, or one of the values is not what is written here.
    """
    try:
        with Image.open(path, formats=("PNG",)) as image:
            image.load()  # chunks may stand behind the pixels
            texts = {name: text for name, text in image.info.items() if isinstance(text, str)}
    except (OSError, SyntaxError, ValueError) as error:  # Pillow's, for damage of one kind or another
        if isinstance(error, FileNotFoundError):
            raise
        raise ValueError(f"image: {str(path)!r} is no PNG that can be read ({error}).") from error
    if texts.get("software") != SOFTWARE:
        return {}
    found: dict[str, Any] = {}
    for name in (*TEXTS, *VALUES):
        try:
            if name in texts:
                found[name] = texts[name] if name in TEXTS else json.loads(texts[name])
        except (ValueError, RecursionError) as error:
            raise ValueError(f"image: {name} in {str(path)!r} is no JSON ({error}); it was changed.") from error
    return found


def model_name(name_or_path: str) -> str:
    """A repository of the Hub as it is; of a folder its last two parts, and nothing of the machine that it lies on."""
    return "/".join(Path(name_or_path).parts[-2:]).lstrip("/") if name_or_path else ""


def _name(value: Any) -> str:
    """A function that stands for a schedule, by its name."""
    return getattr(value, "__name__", type(value).__name__)

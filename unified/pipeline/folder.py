"""A pipeline's folder: its description, what it is loaded with, and its way to the Hub."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from httpx2 import HTTPError

from unified.config import UnifiedConfig
from unified.files import read_json, write_json
from unified.lora.base import BASE_FILE
from unified.model.vision import VisionEncoder
from unified.pipeline.options import check_defaults
from unified_tokenizers import ImageTokenizer

PIPELINE_FILE = "pipeline.json"
VISION_FOLDER = "vision_encoder"
PARTS = ("model", "image_tokenizer", "text_tokenizer", VISION_FOLDER)


def read_description(folder: Path) -> dict[str, Any]:
    """The ``pipeline.json`` of a folder, its sampling defaults checked.

    Raises:
        ValueError: if the folder has none, or it is damaged.
    """
    file = folder / PIPELINE_FILE
    if not file.is_file():
        raise ValueError(f"pipeline: {str(folder)!r} has no {PIPELINE_FILE}; give a folder written by save_pretrained.")
    content = read_json(file, "pipeline")
    try:
        return {**content, "sampling": check_defaults(content.get("sampling"))}
    except ValueError as error:
        raise ValueError(f"pipeline: {str(file)!r}: {error}") from error


def write_description(
    folder: Path, class_name: str, image_tokenizer_fingerprint: str, sampling: Mapping[str, Any]
) -> None:
    """Write the ``pipeline.json`` of a folder; without sampling defaults it is that of earlier versions."""
    description = {"_class_name": class_name, "image_tokenizer_fingerprint": image_tokenizer_fingerprint}
    write_json(folder / PIPELINE_FILE, {**description, **({"sampling": dict(sampling)} if sampling else {})})


def adapter_sampling(folder: Path) -> dict[str, Any]:
    """The sampling defaults of an adapter's folder, checked; empty for one that has none. Raises ValueError."""
    file = folder / BASE_FILE
    if not file.is_file():
        return {}
    try:
        return check_defaults(read_json(file, "lora").get("sampling"))
    except ValueError as error:
        raise ValueError(f"lora: {str(file)!r}: {error}") from error


def as_dtype(torch_dtype: Any, dtype: Any) -> Any:
    """The dtype to load with, given under either of its two names: a ``torch.dtype``, its name or ``auto``; None: float32.

    Raises:
        ValueError: for two different ones, or what is no dtype of floating point.
    """
    found = []
    for name, given in (("torch_dtype", torch_dtype), ("dtype", dtype)):
        if given is not None:
            known = getattr(torch, given.removeprefix("torch."), None) if isinstance(given, str) else given
            if given != "auto" and not (isinstance(known, torch.dtype) and known.is_floating_point):
                raise ValueError(f"{name}: {given!r} is not a floating-point torch.dtype, its name or 'auto'.")
            found.append(known or "auto")
    if len(set(found)) > 1:
        raise ValueError(f"torch_dtype, dtype: {torch_dtype} and {dtype} are two names of one thing; give one of them.")
    return found[0] if found else torch.float32


def check_fingerprint(folder: Path, description: Mapping[str, Any], image_tokenizer: ImageTokenizer) -> None:
    """Raises ValueError if a folder was written with another image tokenizer than it holds."""
    made_with = description.get("image_tokenizer_fingerprint")
    if made_with not in (None, image_tokenizer.fingerprint):
        raise ValueError(
            f"pipeline: {PIPELINE_FILE} of {str(folder)!r} has the image_tokenizer_fingerprint {made_with!r}, its image "
            f"tokenizer {image_tokenizer.fingerprint!r}; get the folder again."
        )


def load_vision(folder: Path, config: UnifiedConfig) -> VisionEncoder | None:
    """The vision encoder in a pipeline's folder; None for a model that has none. Raises ValueError if it is missing or damaged."""
    if config.vision is None:
        return None
    if not (folder / VISION_FOLDER).is_dir():
        raise ValueError(
            f"pipeline: {str(folder)!r} has no {VISION_FOLDER}/, by which its model reads; get the folder again."
        )
    return VisionEncoder(folder / VISION_FOLDER, config.vision.get("layer", -2), config.vision.get("pool", 1))


def check_one_device(model: Any) -> None:
    """Raises ValueError if ``device_map`` has cut a model over devices, which decoding cannot follow."""
    devices = {str(device) for device in (getattr(model, "hf_device_map", None) or {}).values()}
    if len(devices) > 1:
        raise ValueError(
            f"device_map: the model is cut over {sorted(devices)}; decoding needs all of it on one, such as device_map='cuda'."
        )


def push_folder(
    folder: Path, repo_id: str | None, private: bool | None, token: Any, message: str | None, create_pr: bool
) -> None:
    """Upload a pipeline's folder to a repository of the Hub, which is made if there is none; other files in it stay here.

    Raises:
        ValueError: if the Hub cannot be reached or refuses, saying why.
    """
    from huggingface_hub import create_repo, upload_folder

    name = repo_id or folder.resolve().name
    try:
        name = create_repo(name, private=private, token=token, exist_ok=True).repo_id
        upload_folder(
            repo_id=name, folder_path=folder, token=token, commit_message=message or "Upload a pipeline",
            create_pr=create_pr, allow_patterns=[PIPELINE_FILE, "README.md", *(f"{part}/*" for part in PARTS)],
        )  # fmt: skip
    except (OSError, HTTPError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"push_to_hub: {name!r} could not be uploaded ({reason}); {str(folder)!r} is written, push it when the Hub can be "
            "reached and a token that may write is given."
        ) from error

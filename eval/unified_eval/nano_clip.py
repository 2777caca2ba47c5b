"""A small CLIP trained on custom captioned images: the offline stand-in for a pretrained CLIP.

It judges only images like those it was trained on, and its scores carry its name: they do not compare with scores of
another CLIP.
"""

import json
import math
import random
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from unified_eval.clip import CONFIG_FILE, NANO_CLIP_FILE, Clip, clip_features, retrieval_at_1, tokenize

IMAGE_SIZE = 64
CONTEXT_LENGTH = 32
MODEL_CONFIG: dict[str, Any] = {
    "embed_dim": 128,
    "vision_cfg": {"image_size": IMAGE_SIZE, "layers": [1, 1, 1, 1], "width": 16, "head_width": 32},
    "text_cfg": {"context_length": CONTEXT_LENGTH, "vocab_size": 49408, "width": 48, "heads": 4, "layers": 2},
}
PREPROCESS_CONFIG: dict[str, Any] = {
    "size": IMAGE_SIZE,
    "mode": "RGB",
    "mean": [0.5, 0.5, 0.5],
    "std": [0.5, 0.5, 0.5],
    "interpolation": "bicubic",
    "resize_mode": "shortest",
    "fill_color": 255,
}
MAX_LOGIT_SCALE = math.log(100)


def shrink(image: Image.Image) -> Image.Image:
    """The 64 x 64 pixels of an image that this CLIP sees: training on them is training on the image."""
    return Image.fromarray(np.ascontiguousarray(_pixels(image).permute(1, 2, 0).numpy()))


def _pixels(image: Image.Image) -> Tensor:
    """``(3, 64, 64)`` uint8."""
    preprocess = image_transform_v2(PreprocessCfg(**PREPROCESS_CONFIG), is_train=False)
    return preprocess(image.convert("RGB")).add(1).mul(127.5).round().byte()


def train_nano_clip(
    images: Sequence[Image.Image],
    captions: Sequence[str],
    name: str,
    steps: int = 180,
    batch_size: int = 64,
    learning_rate: float = 2e-3,
    weight_decay: float = 0.1,
    seed: int = 0,
    progress: bool = True,
) -> Clip:
    """Train a CLIP of about 4M parameters from scratch on 64 x 64 images.

    Every batch holds each caption at most once, because a repeated caption would be pushed away from its own images.
    Images are shifted, scaled, blurred and given noise, never recoloured: colours belong to captions.

    Args:
        images: N images of any size; they are resized to 64 pixels and centre-cropped (:func:`shrink`).
        captions: N captions; several images may share one.
        name: name of this model that its scores carry, for example ``openmoji-nano``.
        steps: optimizer steps.
        batch_size: images per step, at most the number of different captions.
        learning_rate: peak of a cosine schedule with 10 % warm-up.
        weight_decay: AdamW weight decay of the matrices, without the token embedding.
        seed: seed of the weights, the batches and the augmentation.
        progress: show a progress bar with the loss.

    Returns:
        The model in evaluation mode, with its transform, its tokenizer and ``name``.

    Raises:
        ValueError: if the lists differ in length, a caption is empty or too long, there are fewer than ``batch_size``
            different captions, or a number is out of range.
    """
    if len(images) != len(captions):
        raise ValueError(f"captions: {len(captions)} captions for {len(images)} images; give one for each.")
    if steps < 1 or batch_size < 2:
        raise ValueError(f"steps, batch_size: need 1 or more and 2 or more, got {steps} and {batch_size}.")
    tokenizer = open_clip.SimpleTokenizer(context_length=CONTEXT_LENGTH)
    tokens = tokenize(tokenizer, captions)
    same_caption: dict[tuple[int, ...], list[int]] = {}
    for index, row in enumerate(tokens.tolist()):
        same_caption.setdefault(tuple(row), []).append(index)
    if batch_size > len(same_caption):
        raise ValueError(
            f"batch_size: {batch_size} is above the {len(same_caption)} different captions of the data; "
            "lower it or use more samples, for captions are unique within a batch."
        )
    preprocess = image_transform_v2(PreprocessCfg(**PREPROCESS_CONFIG), is_train=False)
    pixels = torch.stack([_pixels(image) for image in images])

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = open_clip.CLIP(**MODEL_CONFIG).to(memory_format=torch.channels_last)
    model.visual.preprocess_cfg = dict(PREPROCESS_CONFIG)
    optimizer = _optimizer(model, learning_rate, weight_decay)
    loss_of = open_clip.ClipLoss()
    noise = torch.Generator().manual_seed(seed)
    batches = unique_caption_batches(list(same_caption.values()), batch_size, seed)
    model.train()
    with tqdm(total=steps, desc=f"train {name}", unit="step", disable=not progress) as bar:
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate * _schedule(step, steps)
            rows = torch.tensor(next(batches))
            seen = augment(pixels[rows].float() / 127.5 - 1, noise)
            image_features = model.encode_image(seen, normalize=True)
            text_features = model.encode_text(tokens[rows], normalize=True)
            loss = loss_of(image_features, text_features, model.logit_scale.exp())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            with torch.no_grad():
                model.logit_scale.clamp_(max=MAX_LOGIT_SCALE)
            bar.set_postfix(loss=f"{loss.item():.3f}")
            bar.update()
    model.to(memory_format=torch.contiguous_format)  # as it is loaded, so that features stay the same to the bit
    return Clip(model.eval(), preprocess, tokenizer, name)


def unique_caption_batches(groups: Sequence[Sequence[int]], batch_size: int, seed: int) -> Iterator[list[int]]:
    """Yield batches of row numbers endlessly, at most one row of each group in a batch.

    Every pass goes over all groups in a new order and leaves out a remainder smaller than a batch.

    Args:
        groups: row numbers that share a caption, one list for each caption; at least ``batch_size`` lists.
        batch_size: rows in a batch.
        seed: seed of the orders and of the choice within a group.
    """
    chance = random.Random(seed)
    order = list(range(len(groups)))
    while True:
        chance.shuffle(order)
        for start in range(0, len(order) - batch_size + 1, batch_size):
            yield [chance.choice(groups[index]) for index in order[start : start + batch_size]]


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Shift (up to 1/16 of the side), scale (0.9 to 1.1), blur half of and add slight noise to a batch.

    Edge pixels are repeated where the image no longer reaches, and colours are kept, so that the model forgives blurred
    edges of a tokenizer or a generator but not a wrong colour.

    Args:
        images: ``(B, 3, H, W)`` in [-1, 1].
        generator: source of all randomness.

    Returns:
        ``(B, 3, H, W)`` in about [-1, 1], in channels-last layout.
    """
    count, channels, height, width = images.shape
    zoom = 1 / (0.9 + 0.2 * torch.rand(count, generator=generator))
    transform = torch.zeros(count, 2, 3)
    transform[:, 0, 0] = zoom * (width + 2) / width  # one pixel more on each side, for the blur
    transform[:, 1, 1] = zoom * (height + 2) / height
    transform[:, :, 2] = (torch.rand(count, 2, generator=generator) * 2 - 1) / 8  # the side spans 2 units
    grid = F.affine_grid(transform, [count, channels, height + 2, width + 2], align_corners=False)
    images = images.contiguous(memory_format=torch.channels_last)
    framed = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
    moved = framed[:, :, 1:-1, 1:-1]
    blurred = F.conv2d(framed, torch.full((channels, 1, 3, 3), 1 / 9), groups=channels)
    amount = torch.rand(count, 1, 1, 1, generator=generator)
    amount = amount * (torch.rand(count, 1, 1, 1, generator=generator) < 0.5)
    noise = torch.randn(images.shape, generator=generator) * 0.1 * torch.rand(count, 1, 1, 1, generator=generator)
    return (moved.lerp(blurred, amount) + noise).contiguous(memory_format=torch.channels_last)


def grouped_retrieval(
    clip: Clip, images: Sequence[Image.Image], captions: Sequence[str], group_size: int = 64, seed: int = 0
) -> dict[str, float]:
    """Mean R@1 over random groups of ``group_size`` images; one smaller group if there are not that many.

    Returns:
        ``r1``, the ``captions`` in each group and the number of ``groups``.

    Raises:
        ValueError: if captions repeat or there are none.
    """
    size = min(group_size, len(captions))
    image_features, text_features = clip_features(clip, images, captions)
    order = list(range(len(captions)))
    random.Random(seed).shuffle(order)
    groups = [order[start : start + size] for start in range(0, len(order) - size + 1, size)]
    shares = [retrieval_at_1(image_features[g], text_features[g], [captions[i] for i in g]) for g in groups]
    return {"r1": sum(shares) / len(shares), "captions": size, "groups": len(groups)}


def check_nano_clip_folder(folder: str | Path) -> None:
    """Raise ValueError if a folder exists and holds anything but a model of :func:`save_nano_clip`."""
    folder = Path(folder)
    if folder.exists() and not (folder / NANO_CLIP_FILE).is_file() and (folder.is_file() or any(folder.iterdir())):
        raise ValueError(f"out: {str(folder)!r} exists and is no earlier nano CLIP; choose another folder.")


def save_nano_clip(clip: Clip, folder: str | Path, record: dict[str, Any]) -> Path:
    """Save in open_clip's ``local-dir`` layout, with ``nano_clip.json`` (the name and ``record``) beside.

    The folder is written under another name and moved into place. An older folder of this kind is replaced.

    Raises:
        ValueError: as for :func:`check_nano_clip_folder`.
    """
    folder = Path(folder)
    check_nano_clip_folder(folder)
    beside = folder.with_name(folder.name + ".writing")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    config = {"model_cfg": MODEL_CONFIG, "preprocess_cfg": PREPROCESS_CONFIG}
    (beside / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    state = {key: value.detach().cpu().contiguous() for key, value in clip.model.state_dict().items()}
    save_file(state, beside / "open_clip_model.safetensors")
    text = json.dumps({"name": clip.name, **record}, indent=2, ensure_ascii=False)
    (beside / NANO_CLIP_FILE).write_text(text + "\n", encoding="utf-8")
    if folder.exists():
        shutil.rmtree(folder)
    return beside.rename(folder)


def _optimizer(model: torch.nn.Module, learning_rate: float, weight_decay: float) -> torch.optim.Optimizer:
    decayed: list[torch.nn.Parameter] = []
    kept: list[torch.nn.Parameter] = []
    for name, parameter in model.named_parameters():
        (decayed if parameter.ndim > 1 and "embedding" not in name else kept).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": kept, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.98), fused=True)


def _schedule(step: int, steps: int) -> float:
    """Linear warm-up over a tenth of the steps times a cosine to 0."""
    return min(1.0, (step + 1) / max(1, steps // 10)) * 0.5 * (1 + math.cos(math.pi * step / steps))

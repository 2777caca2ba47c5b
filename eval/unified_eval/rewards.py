"""Rewards for recipes/grpo.py: functions of images and their prompts that return a number for each image.

Any function of this kind may be named there by its import path; these measure as ``evaluate.py`` does.
"""

from collections.abc import Mapping, Sequence
from functools import lru_cache

from PIL import Image

from unified_eval.clip import Clip, clip_features, load_clip
from unified_eval.shapes import check_scene, claims_of_caption


def shapes_correct(images: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
    """1 for an image of shapes in which every claim of its caption holds, else 0.

    Raises:
        ValueError: as :func:`unified_eval.shapes.claims_of_caption` and :func:`unified_eval.shapes.check_scene`.
    """
    return [float(checks["correct"]) for checks in _checks(images, prompts)]


def shapes_agreement(images: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
    """The share of what a caption claims (shapes, counts, colours, ...) that holds in its image, 1 if all of it does.

    Raises:
        ValueError: as :func:`shapes_correct`.
    """
    aspects = [[holds for aspect, holds in each.items() if aspect != "correct"] for each in _checks(images, prompts)]
    return [sum(holds) / len(holds) for holds in aspects]


def _checks(images: Sequence[Image.Image], prompts: Sequence[str]) -> list[Mapping[str, bool]]:
    return [check_scene(image, claims_of_caption(prompt)) for image, prompt in zip(images, prompts, strict=True)]


def clip_score(images: Sequence[Image.Image], prompts: Sequence[str], clip: str) -> list[float]:
    """The cosine between image and caption, times 100; ``clip`` is a folder or a name as for :func:`load_clip`.

    Raises:
        ValueError: as :func:`unified_eval.clip.clip_features` and :func:`load_clip`.
    """
    image_features, text_features = clip_features(_loaded(clip), images, prompts)
    return (100 * (image_features * text_features).sum(dim=1)).tolist()


@lru_cache(maxsize=2)
def _loaded(clip: str) -> Clip:
    return load_clip(clip)

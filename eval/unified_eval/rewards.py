"""Rewards for recipes/grpo.py: functions of images and their prompts that return a number for each image.

Any function of this kind may be named there by its import path; these measure as ``evaluate.py`` does.
"""

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from PIL import Image

from unified_eval.clip import Clip, clip_features, load_clip
from unified_eval.shapes import COLOURS, OUTLINES, RELATIONS, SIZES, check_scene

NUMBERS = {"a": 1, "an": 1, "two": 2, "three": 3, "four": 4}
_PHRASE = re.compile(
    rf"(?P<count>{'|'.join(NUMBERS)})(?: (?P<size>{'|'.join(SIZES)}))?(?: (?P<color>{'|'.join(COLOURS)}))?"
    rf" (?P<class>{'|'.join(OUTLINES)})(?:es|s)?"
)
_BETWEEN = re.compile(rf" (?:and|(?:to the )?(?P<relation>{'|'.join(RELATIONS)})) ")
_BACKGROUND = re.compile(rf" on an? (?P<color>{'|'.join(COLOURS)}) background$")


def shapes_correct(images: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
    """1 for an image of shapes in which every claim of its caption holds, else 0.

    Raises:
        ValueError: as :func:`caption_claims` and :func:`unified_eval.shapes.check_scene`.
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
    return [check_scene(image, caption_claims(prompt)) for image, prompt in zip(images, prompts, strict=True)]


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


def caption_claims(caption: str) -> list[dict[str, Any]]:
    """What a caption of ``recipes/prepare_shapes.py`` claims, in GenEval's ``include`` schema.

    Raises:
        ValueError: if the caption is none of those that the recipe writes.
    """
    entries: list[dict[str, Any]] = []
    relation, text = None, caption.strip().lower()
    background = _BACKGROUND.search(text)
    rest = text[: background.start()] if background else text
    for number in range(2):
        phrase = _PHRASE.match(rest)
        if phrase is None:
            raise ValueError(
                f"prompts: {caption!r} is no caption of shapes, such as 'two red circles on a pink background'."
            )
        said = {key: word for key in ("color", "size") if (word := phrase[key])}
        entries.append({"class": phrase["class"], "count": NUMBERS[phrase["count"]], **said})
        rest = rest[phrase.end() :]
        between = _BETWEEN.match(rest) if number == 0 else None
        if between is None:
            break
        relation, rest = between["relation"], rest[between.end() :]
    if rest:
        raise ValueError(f"prompts: {rest!r} in {caption!r} is no part of a caption of shapes.")
    if relation:
        entries.reverse()
        entries[1]["position"] = [relation, 0]
    if background:
        entries.append({"class": "background", "count": 1, "color": background["color"]})
    return entries

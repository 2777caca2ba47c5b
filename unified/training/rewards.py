"""Rewards of images by import path: any function of images and prompts that returns a number for each image."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from reprlib import repr as short
from typing import Any

import torch
from omegaconf import MISSING
from PIL.Image import Image
from torch import Tensor

from unified.settings import check_range

Reward = Callable[[Sequence[Image], Sequence[str]], Sequence[float]]


@dataclass
class RewardSettings:
    """One of several rewards, which are added up by weight."""

    path: str = MISSING  # `module:function` of images and prompts, such as unified_eval.rewards:shapes_agreement
    weight: float = 1.0  # below 0 for something to avoid
    options: dict[str, Any] = field(default_factory=dict)  # further arguments of the function, by name

    def check(self) -> None:
        """Raises ValueError for a weight that is not finite."""
        check_range(f"rewards[{self.path}].", self, "(-inf, inf)", "weight")


def load_reward(path: str, options: Mapping[str, Any] | None = None) -> Reward:
    """The function that a path ``module:function`` names, with ``options`` as further arguments.

    The module is imported and so its code runs: name only what you trust.

    Raises:
        ValueError: if the path is not of this form, the module cannot be imported, or it has no such function.
    """
    module, colon, name = path.partition(":")
    if not (module and colon and name):
        raise ValueError(f"rewards: {path!r} is not of the form module:function.")
    try:
        found = getattr(import_module(module), name, None)
    except ImportError as error:
        raise ValueError(f"rewards: {module!r} of {path!r} cannot be imported ({error}).") from error
    if not callable(found):
        raise ValueError(f"rewards: {module!r} has no function {name!r}.")
    return partial(found, **options) if options else found


class Rewards:
    """Several rewards, added up by weight.

    Args:
        settings: which; each path once.

    Raises:
        ValueError: if there is none, one is there twice, or as :func:`load_reward`.
    """

    def __init__(self, settings: Sequence[RewardSettings]):
        if not settings:
            raise ValueError("rewards: the list is empty; name at least one function.")
        paths = [each.path for each in settings]
        repeated = sorted({path for path in paths if paths.count(path) > 1})
        if repeated:
            raise ValueError(f"rewards: {repeated} are given twice; add up their weights.")
        for each in settings:
            each.check()
        self.settings = list(settings)
        self.functions = {each.path: load_reward(each.path, each.options) for each in settings}

    def __call__(self, images: Sequence[Image], prompts: Sequence[str]) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted sum ``(N,)`` for N images and their prompts, and each reward ``(N,)`` by its path.

        Raises:
            ValueError: as :func:`rewards_of`.
        """
        parts = {path: rewards_of(path, reward, images, prompts) for path, reward in self.functions.items()}
        return torch.stack([each.weight * parts[each.path] for each in self.settings]).sum(dim=0), parts


def rewards_of(path: str, reward: Reward, images: Sequence[Image], prompts: Sequence[str]) -> Tensor:
    """Rewards ``(N,)`` in float32 of N images.

    Raises:
        ValueError: if the function raises, or returns another number of values or one that is no finite number; naming it
            and the prompt.
    """
    try:
        given = reward(images, prompts)
    except Exception as error:
        prompt = _culprit(reward, images, prompts)
        where = f"for {len(prompts)} images" if prompt is None else f"for the prompt {prompt!r}"
        raise ValueError(f"rewards: {path!r} fails {where} ({type(error).__name__}: {error}).") from error
    try:
        values = [float(value) for value in given]
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"rewards: {path!r} returns {short(given)}, first prompt {prompts[0]!r}; return a list of numbers."
        ) from error
    if len(values) != len(images):
        raise ValueError(
            f"rewards: {path!r} returns {len(values)} values for {len(images)} images, first prompt {prompts[0]!r}; return one "
            "for each."
        )
    for value, prompt in zip(values, prompts, strict=True):
        if not math.isfinite(value):
            raise ValueError(f"rewards: {path!r} returns {value} for the prompt {prompt!r}; return finite numbers.")
    return torch.tensor(values)


def _culprit(reward: Reward, images: Sequence[Image], prompts: Sequence[str]) -> str | None:
    """The first prompt whose image alone makes a reward fail; None if it fails for all together only."""
    for image, prompt in zip(images, prompts, strict=True):
        try:
            reward([image], [prompt])
        except Exception:
            return prompt
    return None

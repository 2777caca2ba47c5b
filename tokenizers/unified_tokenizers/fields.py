"""Fields of a configuration that may come from any file: what each of them can be."""

import sys
from collections.abc import Callable, Mapping
from typing import Any

Rule = tuple[str, Callable[[Any], bool]]  # what a value must be, in words, and whether one is


def check_fields(config: object, rules: Mapping[str, Rule]) -> None:
    """Raises ValueError unless every named attribute of ``config`` follows its rule."""
    for name, (wanted, fits) in rules.items():
        value = getattr(config, name)
        if not fits(value):
            raise ValueError(f"{name}: {value!r} must be {wanted}.")


def is_whole(value: Any, least: int = 1) -> bool:
    """Whether a value is a whole number of at least ``least``."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def is_finite(value: Any) -> bool:
    """Whether a value is a finite number."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and abs(value) <= sys.float_info.max  # a whole number may be larger than any float


def whole(least: int = 1) -> Rule:
    """The rule of a size or a number of things."""
    return f"a whole number of at least {least}", lambda value: is_whole(value, least)


def sizes(least: int = 1) -> Rule:
    """The rule of a list of :func:`whole`."""
    return (
        f"a list of whole numbers of at least {least}",
        lambda value: isinstance(value, list | tuple) and all(is_whole(each, least) for each in value),
    )


YES_OR_NO: Rule = ("true or false", lambda value: isinstance(value, bool))
WEIGHT: Rule = ("a finite number of at least 0", lambda value: is_finite(value) and value >= 0)

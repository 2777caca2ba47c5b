"""Classes that a pipeline is called with, by their numbers or their names."""

import difflib
import operator
from collections.abc import Sequence
from typing import Any

from unified.config import UnifiedConfig
from unified.decoding import Prompt


def class_count(config: UnifiedConfig, given: dict[str, Any], texts: dict[str, Any]) -> int | None:
    """Number of classes of a class-conditional model; None of a model that reads prompts.

    Args:
        config: of the model.
        given: classes by the names of their arguments, None where there are none.
        texts: prompts likewise.

    Raises:
        ValueError: for classes that a model does not have, or prompts that it does not read.
    """
    classes = [name for name, value in given.items() if value is not None]
    prompts = [name for name, value in texts.items() if value is not None]
    if config.classes is None:
        if classes:
            raise ValueError(f"{classes[0]}: the model has no classes and reads prompts; leave it out.")
        return None
    if prompts:
        both = f", beside {classes[0]}," if classes else ""
        raise ValueError(
            f"{prompts[0]}: given{both} but the model has classes and reads no text; give class_labels alone, such as 0 or "
            "the name of a class."
        )
    return config.classes


def labels_of(config: UnifiedConfig) -> dict[str, int]:
    """Numbers of the classes by name, sorted by name. Each word for a class is a name, unless two classes share it."""
    return {name: numbers[0] for name, numbers in sorted(_numbers(config).items()) if len(numbers) == 1}


def as_classes(config: UnifiedConfig, given: Any, name: str = "class_labels") -> list[int]:
    """One class or several, by number or name, as numbers.

    Raises:
        ValueError: which calls them ``name``, for a number outside, an unknown name (with the nearest ones), or anything else.
    """
    given = given.tolist() if hasattr(given, "tolist") else given  # of torch or NumPy
    several = isinstance(given, Sequence) and not isinstance(given, str)
    if given is None or (several and not len(given)):
        raise ValueError(f"{name}: {given!r} is no class; give a number or a name, or a list of them.")
    return [_as_class(config, each, name) for each in (given if several else [given])]


def class_prompt(config: UnifiedConfig, number: int) -> Prompt:
    """``<boi>``, whose place a class takes."""
    return Prompt((config.boi_token_id,), condition=number)


def _as_class(config: UnifiedConfig, given: Any, name: str) -> int:
    assert config.classes is not None
    if isinstance(given, str):
        return _by_name(config, given, name)
    try:
        number = None if isinstance(given, bool) else operator.index(given)
    except TypeError:
        number = None
    if number is None:
        raise ValueError(f"{name}: {given!r} is neither the number of a class nor its name.")
    if not 0 <= number < config.classes:
        raise ValueError(f"{name}: {number} is not one of the {config.classes} classes (0 to {config.classes - 1}).")
    return number


def _by_name(config: UnifiedConfig, given: str, name: str) -> int:
    if config.class_names is None:
        raise ValueError(
            f"{name}: {given!r}, but the classes of the model have no names; give a number from 0 to {(config.classes or 1) - 1}."
        )
    numbers = _numbers(config)
    found = numbers.get(given.strip(), [])
    if len(found) == 1:
        return found[0]
    if found:
        raise ValueError(f"{name}: {given!r} is a name of the classes {found}; give one of the numbers.")
    close = difflib.get_close_matches(given, numbers, n=3)
    offer = f"did you mean {', '.join(map(repr, close))}?" if close else "the names are in pipe.labels."
    raise ValueError(f"{name}: no class is called {given!r}; {offer}")


def _numbers(config: UnifiedConfig) -> dict[str, list[int]]:
    """The classes that each name stands for: all words for a class, and those of a whole line."""
    found: dict[str, list[int]] = {}
    for number, line in enumerate(config.class_names or []):
        for word in dict.fromkeys([line.strip(), *(word.strip() for word in line.split(","))]):
            if word:
                found.setdefault(word, []).append(number)
    return found

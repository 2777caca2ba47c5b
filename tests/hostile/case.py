"""A case: an input for an entry point, and what its error has to name."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

from hostile.world import World

VALID = "(valid)"


class Case(NamedTuple):
    """One hostile or odd input.

    Attributes:
        entry: the entry point.
        name: the input, in a few words.
        call: hands the input over.
        words: what the error has to name, separated by spaces; VALID for an input that is to be accepted.
    """

    entry: str
    name: str
    call: Callable[[World], object]
    words: str = VALID


class Silent(Exception):
    """A call has taken what it should not have taken."""


def cases(entry: str, *rows: tuple) -> list[Case]:
    """Rows of name, call and words."""
    return [Case(entry, *row) for row in rows]


def each(entry: str, make: Callable[..., Callable[[World], object]], rows: Iterable[tuple]) -> list[Case]:
    """Rows of an argument for ``make``, words; an argument is its own name."""
    return [Case(entry, shortened(repr(value)), make(value), *rest) for value, *rest in rows]


def shortened(text: str, most: int = 90) -> str:
    """The beginning of a long text."""
    return text if len(text) <= most else text[: most - 3] + "..."

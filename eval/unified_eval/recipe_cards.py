"""Recipe cards: how images of a checkpoint are sampled and measured, as its authors did, in one YAML file."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import MISSING

from unified.decoding import DECODING_MODES
from unified.settings import check_choice, check_range, did_you_mean, load_settings
from unified_eval.files import file_sha256

FOLDER = Path(__file__).with_name("recipes")
# Fields that are options of a command line, by the names that these have there.
OPTIONS = {
    "protocol": ("protocol",), "num_images": ("num_images",), "samples_per_prompt": ("samples_per_caption", "samples"),
    "seed": ("seed",), "guidance_scale": ("guidance_scale",), "temperature": ("temperature",), "top_k": ("top_k",),
    "top_p": ("top_p",), "decoding": ("decoding",),
}  # fmt: skip


@dataclass
class RecipeCard:
    """A card. What its sources do not say is left out, and keeps the default of the command line.

    Attributes:
        checkpoint: what it is a recipe for.
        sources: where its numbers are from.
        guidance_scale, temperature, top_k, top_p, decoding: how a code is sampled.
        resolution: height and width of the images in pixels.
        seed: seed of the first image.
        samples_per_prompt: images for each caption.
        num_images: how many images, or captions for the protocol of captions.
        protocol: a protocol of ``evaluate.py``.
        evaluator, evaluator_version: the program that made the published values.
        published: values by name, as published.
        notes: what a reader should know, such as parts of the original recipe that are not applied.
    """

    checkpoint: str = MISSING
    sources: list[str] = MISSING
    guidance_scale: float | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    decoding: str | None = None
    resolution: list[int] | None = None
    seed: int | None = None
    samples_per_prompt: int | None = None
    num_images: int | None = None
    protocol: str | None = None
    evaluator: str | None = None
    evaluator_version: str | None = None
    published: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def recipe_names() -> list[str]:
    """Names of the cards that come along."""
    return sorted(file.stem for file in FOLDER.glob("*.yaml"))


def find_recipe(name: str | Path) -> Path:
    """The file of a card: one that comes along, by its name, or a file. Raises ValueError if there is none."""
    if str(name) in recipe_names():
        return FOLDER / f"{name}.yaml"
    if not Path(name).is_file():
        raise ValueError(f"recipe: {str(name)!r} is no file and no known name{did_you_mean(str(name), recipe_names())}")
    return Path(name)


def load_recipe(path: str | Path) -> RecipeCard:
    """Read a card. Raises ValueError if it is no YAML file, has an unknown key or a value out of its range."""
    try:
        card = load_settings(RecipeCard, path)
    except ValueError as error:
        raise ValueError(f"recipe: {str(error).removeprefix('config: ')}") from error
    check_range("recipe: ", card, "[1, inf)", "guidance_scale", "num_images", "samples_per_prompt")
    check_range("recipe: ", card, "(0, inf)", "temperature", "resolution")
    check_range("recipe: ", card, "[0, inf)", "top_k", "seed")
    check_range("recipe: ", card, "(0, 1]", "top_p")
    if card.decoding is not None:
        check_choice("recipe: decoding", card.decoding, list(DECODING_MODES))
    if card.resolution is not None and len(card.resolution) != 2:
        raise ValueError(f"recipe: resolution: {card.resolution} must be [height, width].")
    return card


def add_recipe_argument(parser: Any) -> None:
    """Add ``--recipe`` to a parser or a group of it."""
    parser.add_argument(
        "--recipe", metavar="NAME_OR_FILE",
        help=f"recipe card whose settings apply unless an option is given: a YAML file, or one of {', '.join(recipe_names())}",
    )  # fmt: skip


def parse_with_recipe(parser: argparse.ArgumentParser, argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse a command line; the card of ``--recipe`` takes the place of defaults, and options that are given win.

    Returns:
        The arguments; ``recipe`` is None, or a dict ready for JSON: ``name``, ``sha256`` of the file, ``settings`` (those of
        its options that this command line has), ``not_applied`` (the others), ``overrides`` (by option, its value and the
        given one), and the rest of the card.

    Raises:
        ValueError: as for :func:`find_recipe` and :func:`load_recipe`, or for a value that an option does not take.
    """
    args = parser.parse_args(argv)
    if args.recipe is None:
        return args
    path = find_recipe(args.recipe)
    card = load_recipe(path)
    actions = {action.dest: action for action in parser._actions}
    settings, not_applied = {}, {}
    for field_name, destinations in OPTIONS.items():
        value = getattr(card, field_name)
        name = next((name for name in destinations if name in actions), None)
        if value is None:
            continue
        if name is None:
            not_applied[field_name] = value
            continue
        choices = actions[name].choices
        if choices is not None:
            check_choice(f"recipe: {name}", value, list(choices))
        settings[name] = [value] if actions[name].nargs == "+" else value

    # argparse leaves alone what a namespace has: what differs from a mark was given.
    mark = object()
    given = vars(parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(settings, mark))))
    overrides = {
        name: {"recipe": value, "given": given[name]}
        for name, value in settings.items() if given[name] is not mark and given[name] != value
    }  # fmt: skip
    parser.set_defaults(**settings)
    args = parser.parse_args(argv)
    rest = {name: value for name, value in vars(card).items() if name not in OPTIONS and value not in (None, [], {})}
    args.recipe = {
        "name": path.stem, "sha256": file_sha256(path), "settings": settings, "not_applied": not_applied,
        "overrides": overrides, **rest,
    }  # fmt: skip
    return args


def check_resolution(recipe: dict[str, Any] | None, size: tuple[int, int]) -> None:
    """Raises ValueError if images of another size (height, width) are made than a recipe is for."""
    if recipe and recipe.get("resolution") not in (None, list(size)):
        height, width = recipe["resolution"]
        raise ValueError(
            f"recipe: {recipe['name']!r} is for {height}x{width} images, these are {size[0]}x{size[1]}; take the recipe of "
            "this checkpoint, or a copy of the card with another resolution."
        )


def recipe_note(recipe: dict[str, Any] | None) -> list[str]:
    """One line about a recipe and what overrides it, for reports; none without a recipe."""
    if not recipe:
        return []
    changed = [
        f"{name} {change['given']} in place of {change['recipe']}" for name, change in recipe["overrides"].items()
    ]
    tail = f", with overrides: {'; '.join(changed)}" if changed else ", nothing overridden"
    return [f"Recipe {recipe['name']} (sha256 {recipe['sha256'][:12]}){tail}."]

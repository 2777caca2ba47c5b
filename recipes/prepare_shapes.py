"""Prepare procedural scenes of coloured shapes, with captions and exact ground truth, as a `datasets` folder.

    python recipes/prepare_shapes.py --out data/shapes --size 64 --train 4096 --validation 512

Each row holds `image`, `caption`, `tag` (the task, in GenEval's terms), `include` (what the caption claims, in
GenEval's schema) and `objects` (every shape in the image). Row i of a split depends on the seed, the split and i
alone, so that a longer data set begins with the shorter one. Made by code and free to use (CC0-1.0).

What a caption leaves unsaid is fixed, except colour: no size word means medium, no background means white.
"""

import argparse
import cmath
import hashlib
import io
import json
import math
import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import cos, sin
from pathlib import Path
from typing import Any, NamedTuple

import datasets
from PIL import Image, ImageDraw
from tqdm import tqdm

from unified.errors import explain_errors

# The tasks, and how likely a scene of each has two classes, sizes other than medium, and colours in its caption.
PLANS = {
    "single_object": (0, 0, 0), "two_object": (1, 0, 0), "counting": (1 / 2, 1 / 3, 1 / 2), "colors": (0, 0, 1),
    "position": (1, 1 / 3, 1 / 2), "color_attr": (1, 0, 1), "size": (1 / 2, 1, 1 / 2), "background": (1 / 2, 1 / 3, 1),
    "attributes": (0, 2 / 3, 1),
}  # fmt: skip
# One thing of which everything is said has to be asked for.
TASKS = tuple(task for task in PLANS if task != "attributes")
# GenEval's ten colour words; flat regions of an image have exactly these values.
PALETTE = {
    "red": (225, 30, 40), "orange": (250, 135, 15), "yellow": (255, 230, 40), "green": (25, 155, 70),
    "blue": (30, 85, 220), "purple": (145, 40, 160), "pink": (255, 150, 200), "brown": (115, 65, 30),
    "black": (0, 0, 0), "white": (255, 255, 255),
}  # fmt: skip
# Radii as shares of the image's side. The bands lie 24 % or more apart, so that a size word is never a close call.
RADII = {"small": (0.110, 0.125), "medium": (0.155, 0.175), "large": (0.220, 0.250)}
# Sizes of two classes in one scene: plainly unlike or plainly alike. Two large ones would leave no choice of places.
SIZE_PAIRS = (("small", "large"), ("large", "small"), ("small", "small"))
NUMBERS = ("no", "a", "two", "three", "four")
# Unit vectors from the second thing of a caption to the first; y points down.
RELATIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
MIN_SIZE = 16
# Free space between the circles around two shapes, and to the edge. Moving centres into the middle of their pixels
# takes up to sqrt(2) / MIN_SIZE of the first and 0.5 / MIN_SIZE of the second, which is less.
GAP, MARGIN = 0.09, 0.04
# A shape may leave the axis of its relation by this share of the distance along it: then only one relation is true.
MAX_SLANT = 0.4
SUPERSAMPLING = 4
STYLES = ("flat", "outline", "pastel")
STROKE = 0.05  # width of an outline as a share of the image's side
WHITE = 0.5  # share of white in pastel colours


class Thing(NamedTuple):
    """One shape; centre and radius of the circle around it are shares of the image's side, y points down."""

    size: str
    colour: str
    shape: str
    x: float
    y: float
    radius: float


@dataclass(frozen=True)
class Scene:
    """What an image shows and what its caption says. Things of one class also share size and colour."""

    tag: str
    background: str
    things: tuple[Thing, ...]
    names_colours: bool
    names_background: bool
    relation: str | None = None  # of the first thing to the second


def ring(corners: int, inner: float = 1.0) -> list[complex]:
    """Return the corners of a regular polygon or, with ``inner`` < 1, a star: x + iy, the first one on top."""
    return [cmath.rect(inner if k % 2 else 1.0, math.tau * (k / corners - 1 / 4)) for k in range(corners)]


ARC = [math.tau * k / 96 for k in range(96)]
# Corners of each shape around 0; the one farthest out lies at distance 1.
OUTLINES = {
    "circle": ring(len(ARC)),
    "square": [corner * cmath.rect(1, math.pi / 4) for corner in ring(4)],
    "triangle": ring(3),
    "diamond": [complex(0.65 * corner.real, corner.imag) for corner in ring(4)],
    "star": ring(10, inner=0.5),
    "heart": [complex(16 * sin(t) ** 3, 5 * cos(2 * t) + 2 * cos(3 * t) + cos(4 * t) - 13 * cos(t)) / 17 for t in ARC],
    "cross": [corner * turn for turn in ring(4) for corner in (0.94 - 0.34j, 0.94 + 0.34j, 0.34 + 0.34j)],
}
SHAPES = tuple(OUTLINES)
COMBINATIONS = tuple((colour, shape) for colour in PALETTE for shape in SHAPES)
MAX_HELD_OUT = len(COMBINATIONS) // 2


def arrange(
    rng: random.Random, kinds: Sequence[tuple[str, str, str]], relation: str | None, places: int | None = None
) -> tuple[Thing, ...]:
    """Place one thing per (size, colour, shape), apart from each other; two things may have to obey a relation.

    With ``places``, centres lie on so many lines a side, and things of one size word have one radius.
    """
    while True:
        things: list[Thing] = []
        for kind in kinds:
            radius = rng.uniform(*RADII[kind[0]]) if places is None else sum(RADII[kind[0]]) / 2
            low, high = MARGIN + radius, 1 - MARGIN - radius

            def place(low: float = low, high: float = high) -> float:
                if places is None:
                    return rng.uniform(low, high)
                return rng.randint(math.ceil(low * places), math.floor(high * places)) / places

            for _ in range(20):
                new = Thing(*kind, place(), place(), radius)
                if all(math.hypot(new.x - old.x, new.y - old.y) >= radius + old.radius + GAP for old in things):
                    things.append(new)
                    break
        if len(things) == len(kinds) and (relation is None or holds(relation, things[0], things[1])):
            return tuple(things)


def holds(relation: str, first: Thing, second: Thing) -> bool:
    """Whether ``first`` is, say, above ``second``: wholly, with a gap, and not also to the left or right of it."""
    (ux, uy), dx, dy = RELATIONS[relation], first.x - second.x, first.y - second.y
    along, across = dx * ux + dy * uy, abs(dx * uy) + abs(dy * ux)
    return along >= first.radius + second.radius + GAP and across <= MAX_SLANT * along


def sample_scene(
    rng: random.Random,
    allowed: Sequence[tuple[str, str]] = COMBINATIONS,
    places: int | None = None,
    tasks: Sequence[str] = TASKS,
) -> Scene:
    """Sample a scene: one of ``tasks``, then (colour, shape) combinations out of ``allowed``, sizes, background and places.

    ``places`` is that of :func:`arrange`.
    """
    tag = rng.choice(list(tasks))
    pair, sized, names_colours = (rng.random() < chance for chance in PLANS[tag])
    kinds: list[tuple[str, str]] = []
    for _ in range(1 + pair):
        used = {word for kind in kinds for word in kind}
        kinds.append(rng.choice([kind for kind in allowed if used.isdisjoint(kind)]))

    counts = [1] * len(kinds)
    if tag == "counting":
        counts = rng.choice([[1, 2], [2, 1], [1, 3], [3, 1], [2, 2]] if pair else [[2], [3], [4]])
    elif tag == "background" and not pair:
        counts = [rng.choice((1, 2, 3))]

    sizes = ["medium"] * len(kinds)
    if sized and max(counts) > 1:
        sizes = ["small"] * len(kinds)  # what comes in numbers has to fit
    elif sized:
        sizes = list(rng.choice(SIZE_PAIRS)) if pair else [rng.choice(("small", "large"))]

    relation = rng.choice(list(RELATIONS)) if tag == "position" else None
    free = [colour for colour in PALETTE if colour not in {colour for colour, _ in kinds}]
    says_background = tag in ("background", "attributes")
    background = rng.choice(free) if says_background or "white" not in free else "white"

    wanted = [(size, *kind) for size, kind, count in zip(sizes, kinds, counts, strict=True) for _ in range(count)]
    things = arrange(rng, wanted, relation, places)
    return Scene(tag, background, things, names_colours, says_background or background != "white", relation)


def describe(scene: Scene) -> str:
    """Return the caption: ``a large green triangle above a small red star on a yellow background``."""
    parts = []
    for (size, colour, shape), count in Counter(thing[:3] for thing in scene.things).items():
        plural = "" if count == 1 else "es" if shape.endswith("s") else "s"
        adjectives = [size] * (size != "medium") + [colour] * scene.names_colours
        parts.append(" ".join([NUMBERS[count], *adjectives, shape + plural]))
    relation = scene.relation or "and"
    caption = f" {'to the ' if relation.endswith(' of') else ''}{relation} ".join(parts)
    if scene.names_background:
        caption += f" on a {scene.background} background"
    return re.sub(r"\ba (?=[aeiou])", "an ", caption)


def claims(scene: Scene) -> list[dict[str, Any]]:
    """Return what the caption says in GenEval's ``include`` schema, extended by ``size`` and a class ``background``.

    As in GenEval, ``"position": ["above", 0]`` refers to an earlier entry. Unlike there, counts are exact.
    """
    entries: list[dict[str, Any]] = []
    for (size, colour, shape), count in Counter(thing[:3] for thing in scene.things).items():
        said = {"color": scene.names_colours and colour, "size": size != "medium" and size}
        entries.append({"class": shape, "count": count} | {key: word for key, word in said.items() if word})
    if scene.relation:
        entries.reverse()
        entries[1]["position"] = [scene.relation, 0]
    if scene.names_background:
        entries.append({"class": "background", "count": 1, "color": scene.background})
    return entries


def ground_truth(scene: Scene, size: int) -> dict[str, Any]:
    """Return background and shapes, in the caption's order. Centres, in pixels, move into the middle of their pixel."""
    shapes = []
    for size_word, colour, shape, *place, radius in scene.things:
        x, y = (math.floor(value * size) + 0.5 for value in place)
        words = {"class": shape, "color": colour, "size": size_word}
        shapes.append(words | {"x": x, "y": y, "radius": round(radius * size, 3)})
    return {"background": scene.background, "shapes": shapes}


def draw(scene: Scene, size: int, style: str = "flat") -> Image.Image:
    """Render a scene at ``size`` x ``size``. Only pixels that an outline crosses mix two colours.

    The style ``outline`` leaves the inside of the shapes empty; such images cannot be checked from their pixels. ``pastel`` mixes
    every colour with white; :func:`unified_eval.shapes.without_pastel` takes it out again.
    """
    image = Image.new("RGB", (size * SUPERSAMPLING,) * 2, PALETTE[scene.background])
    pen = ImageDraw.Draw(image)
    for shape in ground_truth(scene, size)["shapes"]:
        x, y, radius = (shape[key] * SUPERSAMPLING for key in ("x", "y", "radius"))
        radius -= 0.5  # Pillow also fills pixels that an edge only touches
        stroke = STROKE * size * SUPERSAMPLING if style == "outline" else 0.0
        radius -= stroke / 2
        corners = [(x + radius * corner.real, y + radius * corner.imag) for corner in OUTLINES[shape["class"]]]
        if style == "outline":
            pen.line([*corners, *corners[:2]], fill=PALETTE[shape["color"]], width=round(stroke), joint="curve")
        else:
            pen.polygon(corners, fill=PALETTE[shape["color"]])
    image = image.reduce(SUPERSAMPLING)
    return Image.blend(image, Image.new("RGB", image.size, "white"), WHITE) if style == "pastel" else image


def held_out_combinations(number: int, seed: int) -> list[tuple[str, str]]:
    """Choose (colour, shape) combinations, spread as evenly over colours and shapes as their number permits."""
    rng = random.Random(f"{seed}/held out")
    colours, shapes = rng.sample(list(PALETTE), len(PALETTE)), rng.sample(SHAPES, len(SHAPES))
    # 10 colours and 7 shapes have no common divisor: walking along both meets every combination once.
    return [(colours[k % len(colours)], shapes[k % len(shapes)]) for k in range(number)]


def is_held_out(caption: str, share: float) -> bool:
    """Whether a caption is among a share of all, chosen by its words alone."""
    return int.from_bytes(hashlib.sha256(caption.encode()).digest()[:8], "big") < share * 2**64


def rows(
    split: str,
    count: int,
    size: int,
    seed: int,
    allowed: Sequence[tuple[str, str]],
    style: str,
    places: int | None,
    tasks: Sequence[str] = TASKS,
    held_out: float = 0.0,
) -> Iterator[dict[str, Any]]:
    """Yield the rows of a split. Row i has its own random stream, made from seed, split and i.

    Of all captions the share ``held_out`` belongs to validation, which then has no others, and the rest to train.
    """
    for i in tqdm(range(count), desc=f"render {split}"):
        rng = random.Random(f"{seed}/{split}/{i}")
        while True:
            scene = sample_scene(rng, allowed, places, tasks)
            if not held_out or is_held_out(describe(scene), held_out) == (split == "validation"):
                break
        png = io.BytesIO()
        draw(scene, size, style).save(png, format="PNG")
        yield {
            "image": {"bytes": png.getvalue(), "path": None},
            "caption": describe(scene),
            "tag": scene.tag,
            "include": json.dumps(claims(scene)),
            "objects": json.dumps(ground_truth(scene, size)),
        }


def check_numbers(size: int, train: int, validation: int, places: int | None) -> None:
    """Raises ValueError if a number is too small, or ``places`` out of range."""
    for field, value, low in (("size", size, MIN_SIZE), ("train", train, 0), ("validation", validation, 0)):
        if value < low:
            raise ValueError(f"{field} is {value}, which is too small: use --{field} {low} or more")
    if places is not None and not 16 <= places <= size:
        raise ValueError(f"places is {places}, which is out of range: use --places 16 to the size, {size}")


def make_splits(
    counts: Mapping[str, int], rows: Callable[[str, int], Iterable[dict[str, Any]]], features: datasets.Features
) -> datasets.DatasetDict:
    """The splits that have rows, of ``rows(split, count)``: `datasets` saves an empty split but cannot open it."""
    return datasets.DatasetDict(
        {
            split: datasets.Dataset.from_list(list(rows(split, count)), features=features)
            for split, count in counts.items()
            if count
        }
    )


def add_places_argument(parser: argparse.ArgumentParser) -> None:
    """Add the option --places of :func:`arrange`."""
    parser.add_argument(
        "--places", type=int, metavar="N",
        help="centres lie on N x N places and sizes do not vary, which a small model learns sooner; 16 or more (default: anywhere)",
    )  # fmt: skip


def build(
    size: int,
    train: int,
    validation: int,
    seed: int,
    held_out: int = 0,
    style: str = "flat",
    places: int | None = None,
    tasks: Sequence[str] = TASKS,
    held_out_captions: float = 0.0,
) -> datasets.DatasetDict:
    """Make the splits that have rows. Train never shows ``held_out`` of the (colour, shape) combinations.

    With ``held_out_captions`` train has none of that share of all captions, and validation no others.
    """
    check_numbers(size, train, validation, places)
    if not 0 <= held_out <= MAX_HELD_OUT:
        fix = f"use --hold-out-combinations 0 to {MAX_HELD_OUT}, half of all {len(COMBINATIONS)}"
        raise ValueError(f"hold-out-combinations is {held_out}, which is out of range: {fix}")
    if not 0 <= held_out_captions <= 0.5:
        raise ValueError(f"hold-out-captions is {held_out_captions}, which is out of range: use a share of 0 to 0.5")
    hidden = held_out_combinations(held_out, seed)
    text = datasets.Value("string")
    features = datasets.Features(image=datasets.Image(), caption=text, tag=text, include=text, objects=text)
    allowed = {"train": [kind for kind in COMBINATIONS if kind not in hidden], "validation": COMBINATIONS}

    def of_split(split: str, count: int) -> Iterator[dict[str, Any]]:
        return rows(split, count, size, seed, allowed[split], style, places, tasks, held_out_captions)

    return make_splits({"train": train, "validation": validation}, of_split, features)


CARD = """---
license: cc0-1.0
task_categories: [text-to-image, image-to-text]
---
# Coloured shapes, {size} px, {style}

Procedural scenes with captions and exact ground truth, {train} for training and {validation} for validation.
Made with `recipes/prepare_shapes.py --size {size} --train {train} --validation {validation} --seed {seed}
--hold-out-combinations {held_out} --style {style}{on_places}{with_tasks}{without}`.

- `tag`: {tags}.
- `include`: what the caption claims, a JSON list of `class`, `count`, `color`, `size`, `position` as in GenEval. Counts
  are exact. A claim on the background has the class `background`.
- `objects`: JSON with `background` and `shapes`: `class`, `color`, `size`, centre `x`, `y` and `radius` of the circle
  around the shape, in pixels. Pixel `(int(x), int(y))` has exactly the shape's colour.
- Unsaid in a caption: size is medium, the background is white, colour is any.
- Radius as a share of the side: {radii}. Colours (RGB): {palette}.
- Combinations of colour and shape that only validation has: {hidden}.
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line and write the folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument(
        "--size", type=int, default=64, help=f"side of the images in pixels, {MIN_SIZE} or more (default 64)"
    )
    parser.add_argument("--train", type=int, default=4096, help="scenes to train on (default 4096)")
    parser.add_argument("--validation", type=int, default=512, help="scenes held out (default 512)")
    parser.add_argument("--seed", type=int, default=0, help="seed of all random streams (default 0)")
    parser.add_argument(
        "--hold-out-combinations", type=int, default=0, metavar="N", dest="held_out",
        help="(colour, shape) combinations, e.g. red circles, that train never shows but validation does (default 0)",
    )  # fmt: skip
    parser.add_argument(
        "--hold-out-captions", type=float, default=0.0, metavar="SHARE", dest="held_out_captions",
        help="share of all captions, chosen by their words, that train never has; validation then has no others (default 0)",
    )  # fmt: skip
    parser.add_argument(
        "--style",
        choices=STYLES,
        default=STYLES[0],
        help="filled shapes, their outlines, or filled shapes in pastel colours (default flat)",
    )
    add_places_argument(parser)
    parser.add_argument(
        "--tasks", nargs="+", choices=PLANS, default=list(TASKS), metavar="TASK",
        help=f"kinds of scenes, of {', '.join(PLANS)} (default: all but the last)",
    )  # fmt: skip
    args = parser.parse_args(argv)
    settings = {k: v for k, v in vars(args).items() if k != "out"}
    splits = build(**settings)
    splits.save_to_disk(args.out)
    card = CARD.format(
        **settings, on_places="" if args.places is None else f" --places {args.places}",
        without=f" --hold-out-captions {args.held_out_captions}" if args.held_out_captions else "",
        with_tasks="" if args.tasks == list(TASKS) else f" --tasks {' '.join(args.tasks)}",
        tags=", ".join(f"`{tag}`" for tag in args.tasks),
        hidden=", ".join(" ".join(kind) for kind in held_out_combinations(args.held_out, args.seed)) or "none",
        radii="; ".join(f"{word} {low} to {high}" for word, (low, high) in RADII.items()),
        palette="; ".join(f"{colour} {rgb}" for colour, rgb in PALETTE.items()),
    )  # fmt: skip
    (args.out / "README.md").write_text(card, encoding="utf-8")
    for split, part in splits.items():
        print(f"{args.out}: {len(part)} {split} scenes, {dict(sorted(Counter(part['tag']).items()))}")


if __name__ == "__main__":
    explain_errors(main)

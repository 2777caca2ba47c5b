"""Whether an image of coloured shapes shows what its caption claims, decided from its pixels alone.

The scenes are those of ``recipes/prepare_shapes.py``: flat shapes of ten colours, upright, apart from each other, on a
flat background. Claims are in GenEval's ``include`` schema (Ghosh et al. 2023, https://arxiv.org/abs/2310.11513),
extended by ``size`` and the class ``background``; counts are exact. Nothing is checked that a claim leaves unsaid.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw
from scipy import ndimage

from unified_eval.results import Results
from unified_tokenizers.fields import is_whole

PALETTE = {
    "red": (225, 30, 40), "orange": (250, 135, 15), "yellow": (255, 230, 40), "green": (25, 155, 70),
    "blue": (30, 85, 220), "purple": (145, 40, 160), "pink": (255, 150, 200), "brown": (115, 65, 30),
    "black": (0, 0, 0), "white": (255, 255, 255),
}  # fmt: skip
COLOURS, RGB = tuple(PALETTE), np.array(list(PALETTE.values()), dtype=np.float64)
RELATIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}  # y points down
# Radii as shares of the side, in the middle between the bands that scenes are made with.
SIZES, SIZE_EDGES = ("small", "medium", "large"), (0.140, 0.1975)
SMALLEST_RADIUS = 0.11
MIN_SIDE = 24  # below that, a small square and a small circle cover the same pixels
# The palette's colours lie 90 and more apart, so that a colour this near to one of them is nearer to no other.
MAX_COLOUR_DISTANCE = 60
# Least intersection over union of a shape with the ideal outline of its area and place.
MIN_OVERLAP = 0.75
SUPERSAMPLING = 8
# Standard deviations, as shares of the side, of the blur of ideal outlines: drawn sharply, or through a tokenizer.
BLURS = (0, 0.02)

PASTEL_WHITE = 0.5  # share of white in the colours of pastel scenes

ASPECTS = ("shape", "count", "color", "size", "position", "background")
Claims = str | Sequence[Mapping[str, Any]]


def _star_of(corners: int, inner: float = 1.0) -> np.ndarray:
    turns = np.arange(corners) / corners - 1 / 4
    return np.exp(2j * np.pi * turns) * np.where(np.arange(corners) % 2, inner, 1)


def _heart() -> np.ndarray:
    t = 2 * np.pi * np.arange(96) / 96
    y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return (16 * np.sin(t) ** 3 - 1j * y) / 17


# Corners x + iy around 0, within a circle of radius 1; y points down.
OUTLINES = {
    "circle": _star_of(96),
    "square": _star_of(4) * np.exp(1j * np.pi / 4),
    "triangle": _star_of(3),
    "diamond": (lambda ring: 0.65 * ring.real + 1j * ring.imag)(_star_of(4)),
    "star": _star_of(10, inner=0.5),
    "heart": _heart(),
    "cross": np.concatenate([_star_of(4)[k] * np.array([0.94 - 0.34j, 0.94 + 0.34j, 0.34 + 0.34j]) for k in range(4)]),
}


def _area_and_centroid(corners: np.ndarray) -> tuple[float, complex]:
    following = np.roll(corners, -1)
    cross = corners.real * following.imag - following.real * corners.imag
    return float(cross.sum() / 2), complex((cross * (corners + following)).sum() / (3 * cross.sum()))


GEOMETRY = {name: _area_and_centroid(corners) for name, corners in OUTLINES.items()}
# Less ink than this share of side^2, half of the smallest shape, is a speck and not an object.
MIN_AREA = 0.5 * SMALLEST_RADIUS**2 * min(area for area, _ in GEOMETRY.values())


_NUMBERS = ("a", "an", "two", "three", "four")
_THING = re.compile(
    rf"({'|'.join(_NUMBERS)}) (?:({'|'.join(SIZES)}) )?(?:({'|'.join(COLOURS)}) )?({'|'.join(OUTLINES)})(?:s|es)?"
)
_RELATION = "|".join(["and", *(f"to the {word}" if word.endswith(" of") else word for word in RELATIONS)])
_CAPTION = re.compile(
    rf"(?P<first>{_THING.pattern})(?: (?P<relation>{_RELATION}) (?P<second>{_THING.pattern}))?"
    rf"(?: on an? (?P<background>{'|'.join(COLOURS)}) background)?"
)


class Shape(NamedTuple):
    """One object of an image. ``name`` or ``colour`` is None if it resembles none.

    Centre and radius (of the circle around the outline) are in pixels, y points down. ``overlap`` is the intersection
    over union with the ideal outline, sharp or slightly blurred.
    """

    name: str | None
    colour: str | None
    size: str
    x: float
    y: float
    radius: float
    overlap: float


class Found(NamedTuple):
    """The content of an image: the background's colour (None if it resembles none) and the objects, largest first."""

    background: str | None
    shapes: tuple[Shape, ...]

    def summary(self) -> str:
        """Say it in words: ``large red circle at (20, 31); white background``."""
        parts = [f"{s.size} {s.colour or 'discoloured'} {s.name or 'something'} at ({int(s.x)}, {int(s.y)})"
                 for s in self.shapes]  # fmt: skip
        return "; ".join([*(parts or ["nothing"]), f"{self.background or 'discoloured'} background"])


def check_size(width: int, height: int) -> None:
    """Raise ValueError if shapes cannot be found in images of this size."""
    if height != width or width < MIN_SIDE:
        raise ValueError(f"image: {width}x{height}; need a square image of {MIN_SIDE} pixels or more.")


def without_pastel(image: Image.Image) -> Image.Image:
    """A pastel scene in the palette's colours: the white of ``recipes/prepare_shapes.py --style pastel`` taken out again."""
    white = Image.new("RGB", image.size, "white")
    return Image.blend(white, image.convert("RGB"), 1 / (1 - PASTEL_WHITE))


def find_shapes(image: Image.Image) -> Found:
    """Find background and objects of an image.

    Pixels that differ from the most frequent colour are an object, if they are connected and no speck. Its class is that
    of the outline which, drawn with the object's area and centroid, overlaps it most. Shapes that touch make one object.

    Raises:
        ValueError: if the image is not square or its side is below 24 pixels.
    """
    check_size(image.width, image.height)
    side = image.width
    pixels = np.asarray(image.convert("RGB"), dtype=np.float64)
    distances = np.linalg.norm(pixels[:, :, None] - RGB, axis=3)
    nearest = distances.argmin(2)
    ground = int(np.bincount(nearest.ravel()).argmax())
    ground_colour = np.median(pixels[nearest == ground], axis=0)
    # An edge between two colours may be nearest to a third one. Only colours that fill the inside of something count.
    inside = ndimage.binary_erosion(nearest != ground)
    present = np.isin(np.arange(len(COLOURS)), [ground, *nearest[inside]])
    objects = np.where(present, distances, np.inf).argmin(2) != ground
    labels, count = ndimage.label(objects)
    # Edge pixels that are mostly background still belong to the object beside them.
    reach, (rows, columns) = ndimage.distance_transform_edt(labels == 0, return_indices=True)
    owners = np.where(reach < 1.5, labels[rows, columns], 0)
    shapes = []
    for label in range(1, count + 1):
        body = labels == label
        # Blur mixes the background into thin shapes: the pixels farthest from the background are the least mixed.
        contrast = np.linalg.norm(pixels[body] - ground_colour, axis=1)
        colour = np.median(pixels[body][contrast >= np.quantile(contrast, 0.75)], axis=0)
        step = colour - ground_colour
        cover = np.clip((pixels - ground_colour) @ step / (step @ step), 0, 1) * (owners == label)
        if cover.sum() >= MIN_AREA * side**2:
            shapes.append(_recognise(cover, _name_of(colour)))
    shapes.sort(key=lambda shape: -shape.radius)
    return Found(_name_of(ground_colour), tuple(shapes))


def _name_of(colour: np.ndarray) -> str | None:
    distances = np.linalg.norm(RGB - colour, axis=1)
    return COLOURS[int(distances.argmin())] if distances.min() <= MAX_COLOUR_DISTANCE else None


def _recognise(cover: np.ndarray, colour: str | None) -> Shape:
    """Compare the share of every pixel that an object covers, ``(H, W)``, with the ideal outlines."""
    side, area = len(cover), float(cover.sum())
    y, x = (np.arange(side) + 0.5) @ cover.sum(1) / area, (np.arange(side) + 0.5) @ cover.sum(0) / area
    sharp = _steeper(cover)
    best = Shape(None, colour, "", x, y, math.sqrt(area / math.pi), 0.0)
    for name, corners in OUTLINES.items():
        unit_area, centroid = GEOMETRY[name]
        radius = math.sqrt(area / unit_area)
        centre = complex(x, y) - radius * centroid
        drawn = _draw(centre + radius * corners, side)
        for blur in BLURS:
            ideal = _steeper(ndimage.gaussian_filter(drawn, blur * side) if blur else drawn)
            overlap = float(np.minimum(sharp, ideal).sum() / np.maximum(sharp, ideal).sum())
            if overlap > best.overlap:
                best = Shape(name, colour, "", centre.real, centre.imag, radius, overlap)
    size = SIZES[int(np.searchsorted(SIZE_EDGES, best.radius / side))]
    return best._replace(size=size, name=best.name if best.overlap >= MIN_OVERLAP else None)


def _steeper(cover: np.ndarray) -> np.ndarray:
    """Twice as steep around half a pixel: blur counts less, and the place of an edge within its pixel still counts."""
    return np.clip(2 * cover - 0.5, 0, 1)


def _draw(corners: np.ndarray, side: int) -> np.ndarray:
    """Share of every pixel inside a polygon, ``(side, side)``."""
    canvas = Image.new("L", (side * SUPERSAMPLING,) * 2)
    # Pillow counts from the middle of a pixel and fills pixels that an edge only touches.
    points = corners * SUPERSAMPLING - (0.5 + 0.5j)
    ImageDraw.Draw(canvas).polygon([(point.real, point.imag) for point in points], fill=255)
    return np.asarray(canvas.reduce(SUPERSAMPLING), dtype=np.float64) / 255


def check_scene(image: Image.Image, claims: Claims) -> dict[str, bool]:
    """Check every claim about an image.

    Args:
        image: a square image, 24 pixels or more.
        claims: the ``include`` of a row as a list or as JSON: entries with ``class`` and ``count``, and possibly
            ``color``, ``size`` and ``position`` (``["above", 0]``: above entry 0); the class may be ``background``.

    Returns:
        By aspect, only those that are claimed: ``shape`` (the classes that are there are those claimed, no other),
        ``count`` (each as often as claimed), ``color``, ``size`` and ``position`` (true of every object of the claim,
        and there is one), ``background``; and ``correct``, whether all of them hold.

    Raises:
        ValueError: if a claim is malformed, or as for :func:`find_shapes`.
    """
    return check_found(find_shapes(image), read_claims(claims))


def check_found(found: Found, claims: Sequence[Mapping[str, Any]]) -> dict[str, bool]:
    """As :func:`check_scene`, of objects that were found already and claims that were read already."""
    things = [claim for claim in claims if claim["class"] != "background"]
    classes = [claim["class"] for claim in things]
    checks: dict[str, bool] = {}
    meant: list[list[Shape]] = []
    for claim in claims:
        # Two claims about one class are told apart by their colours.
        by_colour = classes.count(claim["class"]) > 1
        meant.append([shape for shape in found.shapes if shape.name == claim["class"]
                      and (not by_colour or shape.colour == claim["color"])])  # fmt: skip
    if things:
        checks["shape"] = {shape.name for shape in found.shapes} == set(classes)
        total = sum(shape.name in classes for shape in found.shapes) == sum(claim["count"] for claim in things)
        checks["count"] = total and all(
            len(shapes) == claim["count"]
            for claim, shapes in zip(claims, meant, strict=True)
            if claim["class"] != "background"
        )
    for claim, shapes in zip(claims, meant, strict=True):
        if claim["class"] == "background":
            checks["background"] = found.background == claim["color"]
            continue
        for aspect, values in (("color", [s.colour for s in shapes]), ("size", [s.size for s in shapes])):
            if aspect in claim:
                holds = bool(values) and set(values) == {claim[aspect]}
                checks[aspect] = checks.get(aspect, True) and holds
        if "position" in claim:
            relation, other = claim["position"]
            pairs = [(first, second) for first in shapes for second in meant[other]]
            holds = bool(pairs) and all(stands(relation, first, second) for first, second in pairs)
            checks["position"] = checks.get("position", True) and holds
    ordered = {aspect: checks[aspect] for aspect in ASPECTS if aspect in checks}
    return {**ordered, "correct": all(ordered.values())}


def stands(relation: str, first: Shape, second: Shape) -> bool:
    """Whether ``first`` is, say, above ``second``: more so than beside it, so that one relation at most is true."""
    (ux, uy), dx, dy = RELATIONS[relation], first.x - second.x, first.y - second.y
    return dx * ux + dy * uy > abs(dx * uy) + abs(dy * ux)


def read_claims(claims: Claims) -> list[dict[str, Any]]:
    """Read claims from JSON if need be, and check that they can be checked.

    Raises:
        ValueError: if there is none, or one has an unknown class, key or word, a count below 1, refers to itself or a
            later entry, or repeats a class without colours that differ.
    """
    try:
        given = json.loads(claims) if isinstance(claims, str) else claims
    except (ValueError, RecursionError) as error:
        raise ValueError(f"claims: {claims!r:.60} is no JSON ({error}).") from error
    if not isinstance(given, Sequence) or not all(isinstance(claim, Mapping) for claim in given):
        raise ValueError(f"claims: {given!r:.60} is no list of claims with class and count.")
    entries = [dict(claim) for claim in given]
    if not entries:
        raise ValueError("claims: the list is empty; there is nothing to check.")
    words = {"class": (*OUTLINES, "background"), "color": COLOURS, "size": SIZES}
    seen: dict[str, list[str | None]] = {}
    for number, claim in enumerate(entries):
        where = f"claims[{number}]"
        unknown = set(claim) - {"class", "count", "color", "size", "position"}
        if unknown or "class" not in claim or "count" not in claim:
            raise ValueError(f"{where}: {claim} needs class and count, and may have color, size and position only.")
        for key, known in words.items():
            if key in claim and (not isinstance(claim[key], str) or claim[key] not in known):
                raise ValueError(f"{where}: {key} {claim[key]!r} is unknown; use one of {list(known)}.")
        if not is_whole(claim["count"]):
            raise ValueError(f"{where}: count {claim['count']!r} is not 1 or more.")
        if claim["class"] == "background" and set(claim) != {"class", "count", "color"}:
            raise ValueError(f"{where}: {claim} is about the background, which has a color and nothing else.")
        if "position" in claim:
            shapes_before = [index for index in range(number) if entries[index]["class"] != "background"]
            match claim["position"]:
                case [str(relation), int(other)] if relation in RELATIONS and other in shapes_before:
                    pass
                case position:
                    raise ValueError(
                        f"{where}: position {position!r} is not a pair of one of {list(RELATIONS)} and the number of "
                        f"an earlier claim about shapes ({shapes_before})."
                    )
        colours = seen.setdefault(claim["class"], [])
        colours.append(claim.get("color"))
        if len(colours) > 1 and (None in colours or len(set(colours)) < len(colours)):
            raise ValueError(f"{where}: class {claim['class']!r} repeats; give each of its claims another color.")
    return entries


def claims_of_caption(caption: str) -> list[dict[str, Any]]:
    """What a caption of the form of ``recipes/prepare_shapes.py`` claims, as the ``include`` of its row.

    Raises:
        ValueError: if it has another form, such as one that a model wrote may have.
    """
    match = _CAPTION.fullmatch(caption.strip())
    if match is None:
        form = "a small red circle above two stars on a blue background"
        raise ValueError(f"caption: {caption!r:.80} is not of the form {form!r}.")
    claims = []
    for place in ("first", "second"):
        if match[place] is not None:
            number, size, colour, name = _THING.fullmatch(match[place]).groups()  # type: ignore[union-attr]
            said = {"color": colour, "size": size}
            count = 1 + max(0, _NUMBERS.index(number) - 1)
            claims.append({"class": name, "count": count} | {key: word for key, word in said.items() if word})
    if match["relation"] not in (None, "and"):
        claims.reverse()
        claims[1]["position"] = [match["relation"].removeprefix("to the "), 0]
    if match["background"] is not None:
        claims.append({"class": "background", "count": 1, "color": match["background"]})
    return claims


def scene_records(
    images: Sequence[Image.Image],
    claims_per_image: Sequence[Claims],
    tags: Sequence[str] | None = None,
    prompts: Sequence[str] | None = None,
) -> Iterator[dict[str, Any]]:
    """Check images one by one, as GenEval's results file has them.

    Yields:
        ``tag`` (the task; ``scene`` without ``tags``), ``prompt``, ``include`` (the claims), ``correct``, ``reason``
        (the claims that do not hold and the objects that were found; empty if correct) and ``checks``, the result of
        :func:`check_scene`.

    Raises:
        ValueError: if the lists differ in length, or as for :func:`check_scene`.
    """
    for field, given in (("claims_per_image", claims_per_image), ("tags", tags), ("prompts", prompts)):
        if given is not None and len(given) != len(images):
            raise ValueError(f"{field}: {len(given)} for {len(images)} images; give one for each.")
    for number, (image, claims) in enumerate(zip(images, claims_per_image, strict=True)):
        found, entries = find_shapes(image), read_claims(claims)
        checks = check_found(found, entries)
        wrong = [aspect for aspect, holds in checks.items() if not holds and aspect != "correct"]
        yield {
            "tag": tags[number] if tags is not None else "scene",
            "prompt": prompts[number] if prompts is not None else str(number),
            "include": entries,
            "correct": checks["correct"],
            "reason": f"{', '.join(wrong)}: {found.summary()}" if wrong else "",
            "checks": checks,
        }


def shapes_accuracy(
    images: Sequence[Image.Image],
    claims_per_image: Sequence[Claims],
    tags: Sequence[str] | None = None,
    prompts: Sequence[str] | None = None,
    seed: int = 0,
) -> Results:
    """Share of images that show what their captions claim, overall, by task and by aspect, with 95 % intervals.

    Args:
        images: N square images.
        claims_per_image: for each image, the claims that :func:`check_scene` checks.
        tags: the task of each, such as ``counting``.
        prompts: the prompt of each; images of one prompt are not independent, and intervals take that into account.
        seed: seed of the bootstrap.

    Returns:
        The values of :func:`add_records`.

    Raises:
        ValueError: as for :func:`scene_records`, or if there is no image.
    """
    records = list(scene_records(images, claims_per_image, tags, prompts))
    results = Results(list(dict.fromkeys(record["prompt"] for record in records)), seed=seed)
    add_records(results, records)
    return results


def add_records(results: Results, records: Sequence[Mapping[str, Any]]) -> None:
    """Add the shares of the records of :func:`scene_records` that are correct.

    These are ``shapes_correct``; ``shapes_task_<tag>`` and their mean ``shapes_task_mean`` (without interval);
    ``shapes_aspect_<aspect>``, among images about which it is claimed; and with several images a prompt
    ``shapes_any_correct``, the share of prompts with a correct one.

    Raises:
        ValueError: if there is no record.
    """
    if not records:
        raise ValueError("images: the list is empty; give at least one image.")

    def add(name: str, label: str, hits: Sequence[bool], prompts: Sequence[str]) -> None:
        results.add_mean(
            name, np.array(hits, dtype=float), label, prompts, prompts=len(set(prompts)), checker="from pixels"
        )

    prompts = [record["prompt"] for record in records]
    add("shapes_correct", "images of shapes with every claim true", [r["correct"] for r in records], prompts)
    if len(set(prompts)) < len(prompts):
        any_correct: dict[str, bool] = {}
        for record in records:
            any_correct[record["prompt"]] = any_correct.get(record["prompt"], False) or record["correct"]
        add("shapes_any_correct", "prompts with a correct image", list(any_correct.values()), list(any_correct))
    tags = sorted({record["tag"] for record in records})
    for tag in tags:
        part = [record for record in records if record["tag"] == tag]
        add(f"shapes_task_{tag}", f"task {tag}", [r["correct"] for r in part], [r["prompt"] for r in part])
    mean = sum(results.metrics[f"shapes_task_{tag}"] for tag in tags) / len(tags)
    recipe = {**results.recipes["shapes_correct"], "label": f"mean over {len(tags)} tasks"}
    results.add("shapes_task_mean", mean, **recipe)
    for aspect in ASPECTS:
        part = [record for record in records if aspect in record["checks"]]
        if part:
            hits = [r["checks"][aspect] for r in part]
            add(f"shapes_aspect_{aspect}", f"{aspect} as claimed", hits, [r["prompt"] for r in part])

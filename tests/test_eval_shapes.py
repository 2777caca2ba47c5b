"""The checker of shapes: right about ground truth, and not to be fooled by anything else."""

import io
import json
import math
import random

import numpy as np
import pytest
from PIL import Image, ImageFilter

import prepare_shapes as recipe
from unified_eval import check_scene, find_shapes, scene_records, shapes, shapes_accuracy, wilson_interval
from unified_eval.intervals import bootstrap_interval, share_interval

WHITE = recipe.PALETTE["white"]


def thing(name="circle", colour="red", size="medium", x=0.5, y=0.5):
    return recipe.Thing(size, colour, name, x, y, sum(recipe.RADII[size]) / 2)


def image_of(*things, background="white", side=64):
    return recipe.draw(recipe.Scene("test", background, things, True, True), side)


def scenes(count, stream="checker"):
    return [recipe.sample_scene(random.Random(f"{stream}/{i}")) for i in range(count)]


def noisy(image, deviation, seed=0):
    noise = np.random.default_rng(seed).normal(0, deviation, (*image.size, 3))
    return Image.fromarray((np.asarray(image) + noise).round().clip(0, 255).astype(np.uint8))


def failing(image, claims):
    return {aspect for aspect, holds in check_scene(image, claims).items() if not holds} - {"correct"}


def test_definitions_are_those_of_the_recipe():
    assert shapes.PALETTE == recipe.PALETTE and shapes.RELATIONS == recipe.RELATIONS
    assert list(shapes.OUTLINES) == list(recipe.OUTLINES)
    for name, corners in recipe.OUTLINES.items():
        # An outline may begin at another corner.
        ours, theirs = (sorted((round(c.real, 9) + 0, round(c.imag, 9) + 0) for c in outline)
                        for outline in (shapes.OUTLINES[name], corners))  # fmt: skip
        assert np.allclose(ours, theirs, atol=1e-8), name
    bands = [recipe.RADII[size] for size in shapes.SIZES]
    assert all(low[1] < edge < high[0] for edge, low, high in zip(shapes.SIZE_EDGES, bands, bands[1:], strict=False))
    assert recipe.RADII["small"][0] == shapes.SMALLEST_RADIUS


@pytest.mark.process
@pytest.mark.parametrize("side", [32, 64])
def test_at_least_99_percent_of_ground_truth_is_read_exactly(side):
    """Every claim holds, and every object is found where it is: 200 scenes of all tasks."""
    many = scenes(200)
    images = [recipe.draw(scene, side) for scene in many]
    result = shapes_accuracy(images, [recipe.claims(scene) for scene in many], [scene.tag for scene in many])
    assert result.metrics["shapes_correct"] >= 0.99
    assert min(value for name, value in result.metrics.items()) >= 0.95
    exact = 0
    for scene, image in zip(many, images, strict=True):
        truth, found = recipe.ground_truth(scene, side), find_shapes(image)
        wanted = sorted((s["class"], s["color"], s["size"], s["x"], s["y"], s["radius"]) for s in truth["shapes"])
        got = sorted((s.name or "", s.colour or "", s.size, s.x, s.y, s.radius) for s in found.shapes)
        exact += found.background == truth["background"] and len(wanted) == len(got) and all(
            a[:3] == b[:3] and np.allclose(a[3:], b[3:], atol=0.25) for a, b in zip(wanted, got, strict=True)
        )  # fmt: skip
    assert exact >= 0.99 * len(many)


@pytest.mark.process
@pytest.mark.parametrize("change", ["blur", "noise", "jpeg"])
def test_what_a_tokenizer_does_to_a_image_is_forgiven(change):
    many = scenes(60, "forgiven")
    images = [recipe.draw(scene, 64) for scene in many]
    if change == "blur":
        images = [image.filter(ImageFilter.GaussianBlur(1.2)) for image in images]
    elif change == "noise":
        images = [noisy(image, 12) for image in images]
    else:
        for i, image in enumerate(images):
            image.save(buffer := io.BytesIO(), "JPEG", quality=85)
            images[i] = Image.open(buffer).convert("RGB")
    found = shapes_accuracy(images, [recipe.claims(scene) for scene in many]).metrics
    assert found["shapes_correct"] >= 0.95


@pytest.mark.process
def test_claims_of_other_scenes_do_not_hold():
    """Every scene against the claims of 10 others: correct only where the other caption happens to be true as well."""
    many = scenes(60, "shuffled")
    found = [find_shapes(recipe.draw(scene, 64)) for scene in many]
    false_alarms = 0
    for i, scene in enumerate(many):
        for other in [many[(i + step) % len(many)] for step in range(1, 11)]:
            truth, claims = recipe.ground_truth(scene, 64), recipe.claims(other)
            holds = shapes.check_found(found[i], claims)["correct"]
            false_alarms += holds and not true_of(truth, claims)
    assert false_alarms == 0


def true_of(truth, claims):
    """Whether counts, colours and sizes of claims are true of a ground truth (positions are left out)."""
    things = [claim for claim in claims if claim["class"] != "background"]
    for claim in things:
        part = [s for s in truth["shapes"] if s["class"] == claim["class"]]
        if len(part) != claim["count"] or any(s[k] != claim[k] for s in part for k in ("color", "size") if k in claim):
            return False
    background = [claim["color"] for claim in claims if claim["class"] == "background"]
    return {s["class"] for s in truth["shapes"]} == {c["class"] for c in things} and background in (
        [],
        [truth["background"]],
    )


CLAIMS = [
    {"class": "star", "count": 1, "color": "blue", "size": "small"},
    {"class": "cross", "count": 1, "color": "orange", "size": "large", "position": ["above", 0]},
    {"class": "background", "count": 1, "color": "white"},
]
CROSS, STAR = thing("cross", "orange", "large", 0.5, 0.3), thing("star", "blue", "small", 0.5, 0.8)


@pytest.mark.parametrize(
    ("things", "background", "wrong"),
    [
        ((CROSS, STAR), "white", set()),
        ((CROSS._replace(colour="yellow"), STAR), "white", {"color"}),
        ((CROSS._replace(colour="blue"), STAR._replace(colour="orange")), "white", {"color"}),  # binding swapped
        ((CROSS._replace(y=0.7), STAR._replace(y=0.2)), "white", {"position"}),
        ((CROSS._replace(x=0.3, y=0.5), STAR._replace(x=0.8, y=0.5)), "white", {"position"}),
        ((CROSS, thing("star", "blue", "medium", 0.5, 0.8)), "white", {"size"}),
        ((CROSS, STAR), "pink", {"background"}),
        ((CROSS, STAR, STAR._replace(x=0.15)), "white", {"count"}),
        ((CROSS, STAR, thing("heart", "red", "small", 0.15, 0.85)), "white", {"shape"}),
        ((CROSS, STAR._replace(shape="circle")), "white", {"shape", "count", "color", "size", "position"}),
        ((CROSS,), "white", {"shape", "count", "color", "size", "position"}),
        ((), "white", {"shape", "count", "color", "size", "position"}),
    ],
)  # fmt: skip
def test_only_what_is_wrong_is_called_wrong(things, background, wrong):
    assert failing(image_of(*things, background=background), CLAIMS) == wrong


@pytest.mark.parametrize("claimed", [1, 2, 3, 4, 5])
def test_counts_are_exact(claimed):
    three = [thing("heart", "red", "small", x, y) for x in (0.2, 0.5, 0.8) for y in (0.3, 0.7)][:3]
    assert failing(image_of(*three), [{"class": "heart", "count": claimed}]) == (set() if claimed == 3 else {"count"})


def test_two_claims_of_one_class_are_told_apart_by_colour():
    claims = [{"class": "circle", "count": 1, "color": "red"},
              {"class": "circle", "count": 1, "color": "blue", "position": ["left of", 0]}]  # fmt: skip
    red, blue = thing(colour="red", x=0.8), thing(colour="blue", x=0.2)
    assert failing(image_of(red, blue), claims) == set()
    assert failing(image_of(red._replace(x=0.2), blue._replace(x=0.8)), claims) == {"position"}
    assert failing(image_of(red, blue._replace(colour="red")), claims) == {"count", "color", "position"}
    green = thing(colour="green", x=0.5, y=0.85, size="small")
    assert "count" in failing(image_of(red, blue, green), claims)


def test_noise_and_blots_are_no_shapes():
    rng = np.random.default_rng(0)
    static = Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8))
    smooth = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)).resize((64, 64), Image.Resampling.BICUBIC)
    grey_ball = image_of(thing(colour="black", size="large"))
    grey_ball = Image.eval(grey_ball, lambda value: 128 if value < 128 else value)
    for image in (static, smooth, Image.new("RGB", (64, 64), WHITE)):
        for name in shapes.OUTLINES:
            assert not check_scene(image, [{"class": name, "count": 1}])["correct"], name
    assert failing(grey_ball, [{"class": "circle", "count": 1, "color": "black"}]) == {"color"}
    crescent = image_of(thing("circle", "red", "large"))
    crescent.paste(WHITE, (28, 0, 64, 64))
    bar = image_of()
    bar.paste(recipe.PALETTE["red"], (10, 28, 54, 36))
    for image in (crescent, bar):
        assert [(found.name, found.colour) for found in find_shapes(image).shapes] == [(None, "red")]


def test_specks_do_not_count_but_small_shapes_do():
    image = image_of(thing(size="large"))
    image.putpixel((3, 3), (0, 0, 0))
    image.paste((0, 0, 0), (58, 58, 60, 60))
    assert failing(image, [{"class": "circle", "count": 1, "color": "red"}]) == set()
    image.paste((0, 0, 0), (2, 2, 10, 10))
    assert failing(image, [{"class": "circle", "count": 1, "color": "red"}]) == {"shape"}


def test_merged_shapes_are_not_two():
    joined = image_of(thing("circle", "red", "medium", 0.35), thing("circle", "red", "medium", 0.6))
    assert not check_scene(joined, [{"class": "circle", "count": 2}])["correct"]
    assert not check_scene(joined, [{"class": "circle", "count": 1}])["correct"]


def test_exactly_one_relation_holds_between_two_shapes():
    for angle in np.linspace(0.1, 2 * np.pi, 16, endpoint=False):
        first = shapes.Shape("star", "red", "small", 10 * math.cos(angle), 10 * math.sin(angle), 1, 1)
        second = first._replace(x=0.0, y=0.0)
        assert sum(shapes.stands(relation, first, second) for relation in shapes.RELATIONS) == 1


def test_accuracy_counts_tasks_aspects_and_prompts():
    red, blue = image_of(thing()), image_of(thing(colour="blue"))
    claim = json.dumps([{"class": "circle", "count": 1, "color": "red"}])
    plain = json.dumps([{"class": "circle", "count": 1}])
    images, tags = [red, blue, blue, red, blue, blue], ["colors"] * 4 + ["single_object"] * 2
    claims, prompts = [claim] * 4 + [plain] * 2, ["a", "a", "b", "b", "c", "d"]
    result = shapes_accuracy(images, claims, tags, prompts)
    assert result.metrics == {
        "shapes_correct": 4 / 6, "shapes_any_correct": 1.0, "shapes_task_colors": 0.5, "shapes_task_single_object": 1.0,
        "shapes_task_mean": 0.75, "shapes_aspect_shape": 1.0, "shapes_aspect_count": 1.0, "shapes_aspect_color": 0.5,
    }  # fmt: skip
    correct = [1, 0, 0, 1, 1, 1]
    assert result.intervals["shapes_correct"] == bootstrap_interval(correct, prompts)
    assert result.intervals["shapes_task_single_object"] == wilson_interval(2, 2)
    alone = shapes_accuracy(images, claims, tags)
    assert alone.intervals["shapes_correct"] == wilson_interval(4, 6) and "shapes_any_correct" not in alone.metrics
    assert result.recipes["shapes_aspect_color"] == {
        "label": "color as claimed", "n": 4, "prompts": 2, "checker": "from pixels",
    }  # fmt: skip
    record = list(scene_records(images, claims, tags, prompts))[1]
    assert (record["tag"], record["prompt"], record["correct"]) == ("colors", "a", False)
    assert record["reason"] == "color: medium blue circle at (32, 32); white background"


def test_wilson_and_bootstrap_against_closed_forms():
    z = 1.959963984540054
    for hits, count in ((0, 20), (7, 30), (20, 20)):
        p = hits / count
        middle = (p + z * z / (2 * count)) / (1 + z * z / count)
        half = z * math.sqrt(p * (1 - p) / count + z * z / (4 * count**2)) / (1 + z * z / count)
        assert wilson_interval(hits, count) == pytest.approx((middle - half, middle + half), abs=1e-12)
    values = np.random.default_rng(0).normal(5, 2, 400)
    low, high = bootstrap_interval(values)
    deviation = values.std() / math.sqrt(400)
    assert (low, high) == pytest.approx((values.mean() - z * deviation, values.mean() + z * deviation), abs=0.03)
    # Four copies of each value in one prompt add nothing; as images of their own they would halve the interval.
    groups = np.repeat(np.arange(100), 4)
    repeated = np.repeat(values[:100], 4)
    wide, narrow = bootstrap_interval(repeated, groups), bootstrap_interval(repeated)
    assert wide == pytest.approx(bootstrap_interval(values[:100]), abs=1e-12)
    assert (wide[1] - wide[0]) / (narrow[1] - narrow[0]) == pytest.approx(2, rel=0.15)
    middle = bootstrap_interval(values, statistic=lambda rows: float(np.median(rows)))
    assert middle[1] - middle[0] == pytest.approx(1.2533 * (high - low), rel=0.25)  # sqrt(pi / 2), of a Gaussian


def test_a_share_of_0_or_1_still_has_an_interval():
    groups = ["a", "a", "b", "b", "c", "d"]
    assert share_interval([False] * 6, groups) == wilson_interval(0, 4)
    assert share_interval([True] * 6, groups) == wilson_interval(4, 4)
    assert share_interval([True] * 6, range(6)) == wilson_interval(6, 6)
    mixed = [True, False, True, True, False, True]
    assert share_interval(mixed, groups, seed=2) == bootstrap_interval(np.array(mixed, dtype=float), groups, seed=2)
    assert share_interval([True, False], ["a", "a"]) == (0, 1)


@pytest.mark.parametrize(
    ("claims", "message"),
    [
        ([], "claims: the list is empty"),
        ([{"class": "dog", "count": 1}], r"claims\[0\]: class 'dog' is unknown; use one of \['circle'"),
        ([{"class": "star", "count": 0}], r"claims\[0\]: count 0 is not 1 or more"),
        ([{"class": "star"}], r"claims\[0\]: .* needs class and count"),
        ([{"class": "star", "count": 1, "colour": "red"}], r"claims\[0\]: .* may have color, size and position only"),
        ([{"class": "star", "count": 1, "color": "teal"}], "color 'teal' is unknown"),
        ([{"class": "star", "count": 1, "size": "tiny"}], "size 'tiny' is unknown"),
        (
            [{"class": "star", "count": 1, "position": ["above", 0]}],
            r"claims\[0\]: position \['above', 0\] is not a pair",
        ),
        ([{"class": "star", "count": 1, "position": 3}], r"claims\[0\]: position 3 is not a pair"),
        ([{"class": "background", "count": 1}], "is about the background, which has a color and nothing else"),
        ([{"class": "star", "count": 1}] * 2, "class 'star' repeats; give each of its claims another color"),
    ],
)
def test_claims_that_cannot_be_checked_are_errors(claims, message):
    with pytest.raises(ValueError, match=message):
        check_scene(image_of(thing()), claims)


def test_images_that_cannot_be_checked_are_errors():
    claims = [{"class": "star", "count": 1}]
    with pytest.raises(ValueError, match="image: 32x16; need a square image of 24 pixels or more"):
        check_scene(Image.new("RGB", (32, 16)), claims)
    with pytest.raises(ValueError, match="image: 8x8; need a square"):
        check_scene(Image.new("RGB", (8, 8)), claims)
    with pytest.raises(ValueError, match="tags: 2 for 1 images; give one for each"):
        shapes_accuracy([image_of()], [claims], tags=["a", "b"])
    with pytest.raises(ValueError, match="images: the list is empty"):
        shapes_accuracy([], [])
    with pytest.raises(ValueError, match="hits, count: 3 of 2 is no share"):
        wilson_interval(3, 2)
    with pytest.raises(ValueError, match="groups, resamples: 1 and 2000; an interval needs 2 or more of both"):
        bootstrap_interval([1, 2], ["a", "a"])
    with pytest.raises(ValueError, match="values: number 1 is not finite"):
        bootstrap_interval([1, math.nan])


def test_captions_are_read_as_what_they_claim():
    for scene in scenes(300, "captions"):
        assert shapes.claims_of_caption(recipe.describe(scene)) == recipe.claims(scene)
    for text in (
        "",
        "a red",
        "a red circle above",
        "five red circles",
        "a circle and a square and a star",
        "Eine rote Kugel",
    ):
        with pytest.raises(ValueError, match="is not of the form 'a small red circle above two stars"):
            shapes.claims_of_caption(text)


def test_pastel_scenes_are_checked_without_their_white():
    found = scenes(100, "pastel")
    pastel = [recipe.draw(scene, 64, "pastel") for scene in found]
    claims = [recipe.claims(scene) for scene in found]
    for image, scene in zip(pastel, found, strict=True):
        flat = np.asarray(recipe.draw(scene, 64)).astype(int)
        assert np.abs(np.asarray(image) - (flat + 255) / 2).max() <= 1
        assert np.abs(np.asarray(shapes.without_pastel(image)) - flat).max() <= 1
    assert shapes.shapes_accuracy([*map(shapes.without_pastel, pastel)], claims).metrics["shapes_correct"] == 1
    assert shapes.shapes_accuracy(pastel, claims).metrics["shapes_correct"] < 0.5


def test_outlines_are_empty_inside():
    scene = recipe.Scene("test", "white", (thing("circle", "red", "large"),), True, True)
    flat, outline = (np.asarray(recipe.draw(scene, 64, style)).astype(int) for style in ("flat", "outline"))
    assert (flat[32, 32] == recipe.PALETTE["red"]).all() and (outline[32, 32] == WHITE).all()
    radius = recipe.ground_truth(scene, 64)["shapes"][0]["radius"]
    ring = math.pi * (radius**2 - (radius - recipe.STROKE * 64) ** 2)
    ink = (np.array(WHITE) - outline).sum() / (np.array(WHITE) - recipe.PALETTE["red"]).sum()
    assert ink == pytest.approx(ring, rel=0.1)
    for axis in (0, 1):  # and the line stays within the shape
        extents = [np.flatnonzero((image != WHITE).any(-1).any(axis))[[0, -1]] for image in (flat, outline)]
        assert np.abs(extents[0] - extents[1]).max() <= 1

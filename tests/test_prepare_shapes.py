"""The shapes recipe: images, captions and ground truth have to agree exactly."""

import io
import itertools
import json
import math
import random
import re
import sys
from collections import Counter

import datasets
import numpy as np
import pytest
from PIL import Image

import prepare_shapes as shapes

SIZE = 64
NUMBERS = {"a": 1, "an": 1, "two": 2, "three": 3, "four": 4}
GROUP = re.compile(r"(?P<number>an?|two|three|four)(?: (?P<size>small|large))?(?: (?P<color>\w+))? (?P<noun>\w+)")
RELATIONS = {
    "and": None,
    "to the left of": "left of",
    "to the right of": "right of",
    "above": "above",
    "below": "below",
}


def scenes(count=300, stream="test"):
    return [shapes.sample_scene(random.Random(f"{stream}/{i}")) for i in range(count)]


SCENES = scenes()


def singular(noun):
    return {"crosses": "cross"}.get(noun, noun.removesuffix("s") if noun != "cross" else noun)


def parse(caption):
    """Read a caption back, independently of the recipe: groups, relation between the first two, background."""
    caption, _, background = caption.partition(" on ")
    match = re.split(r" (and|above|below|to the left of|to the right of) ", caption)
    groups = []
    for text in match[::2]:
        found = GROUP.fullmatch(text)
        assert found, text
        claim = {"class": singular(found["noun"]), "count": NUMBERS[found["number"]]}
        groups.append(claim | {key: found[key] for key in ("color", "size") if found[key]})
        assert found["noun"].endswith(("es", "s") if claim["count"] > 1 else ("cross", *"eltrd")), text
    background = re.fullmatch(r"an? (\w+) background", background)[1] if background else None
    return groups, RELATIONS[match[1]] if len(match) > 1 else None, background


def things(scene, **wanted):
    found = shapes.ground_truth(scene, SIZE)["shapes"]
    return [thing for thing in found if all(thing[key] == value for key, value in wanted.items())]


def relations(first, second):
    """GenEval's own rule for boxes (`relative_position`, threshold 0.1), on the squares around two shapes."""
    offset = [first["x"] - second["x"], first["y"] - second["y"]]
    slack = 0.1 * 2 * (first["radius"] + second["radius"])
    dx, dy = (math.copysign(max(abs(value) - slack, 0), value) / math.hypot(*offset) for value in offset)
    true = {"left of": dx < -0.5, "right of": dx > 0.5, "above": dy < -0.5, "below": dy > 0.5}
    return {relation for relation, is_true in true.items() if is_true}


@pytest.mark.parametrize("size", [16, 33, 64])
def test_centres_and_background_have_exactly_the_palette_colours(size):
    for scene in SCENES:
        image, truth = shapes.draw(scene, size), shapes.ground_truth(scene, size)
        assert image.size == (size, size) and image.mode == "RGB"
        far = np.ones((size, size), dtype=bool)
        for shape in truth["shapes"]:
            y, x = np.mgrid[:size, :size] + 0.5
            far &= np.hypot(x - shape["x"], y - shape["y"]) > shape["radius"] + 0.75
        assert far.any() and (np.asarray(image)[far] == shapes.PALETTE[truth["background"]]).all()
        for shape in truth["shapes"]:
            assert image.getpixel((int(shape["x"]), int(shape["y"]))) == shapes.PALETTE[shape["color"]], shape


@pytest.mark.parametrize(
    ("shape", "area"),
    [
        ("circle", math.pi),
        ("square", 2.0),
        ("triangle", 3 * math.sqrt(3) / 4),
        ("diamond", 2 * 0.65),
        ("star", 5 / 2 * math.sin(math.pi / 5)),  # ten triangles with sides 1 and 1/2
        ("heart", 180 * math.pi / 17**2),
        ("cross", 4 * 0.34 * (2 * 0.94 - 0.34)),
    ],
)
def test_a_shape_covers_its_area_and_reaches_its_radius(shape, area):
    thing = shapes.Thing("large", "black", shape, 0.5, 0.5, 0.25)
    image = shapes.draw(shapes.Scene("size", "white", (thing,), True, False), 128)
    ink = 1 - np.asarray(image.convert("L")) / 255
    assert ink.sum() / 32**2 == pytest.approx(area, rel=0.02)
    assert (ink.sum(0) * (np.arange(128) + 0.5)).sum() / ink.sum() == pytest.approx(64.5, abs=0.1)
    assert max(abs(corner) for corner in shapes.OUTLINES[shape]) == pytest.approx(1, abs=1e-3)


def test_edges_are_anti_aliased_and_flat_regions_are_flat():
    thing = shapes.Thing("large", "black", "circle", 0.5, 0.5, 0.25)
    values = Counter(shapes.draw(shapes.Scene("size", "white", (thing,), True, False), 64).convert("L").tobytes())
    assert len(values) > 5, "no shades between black and white"
    assert values[0] + values[255] > 0.95 * 64 * 64, "the edge is wider than the pixels it crosses"


def test_objects_are_disjoint_and_on_the_canvas():
    for scene, size in itertools.product(SCENES, (16, 64)):
        found = shapes.ground_truth(scene, size)["shapes"]
        for first, second in itertools.combinations(found, 2):
            distance = math.hypot(first["x"] - second["x"], first["y"] - second["y"])
            assert distance > first["radius"] + second["radius"], (first, second)
        for shape in found:
            assert shape["radius"] < min(shape["x"], shape["y"], size - shape["x"], size - shape["y"]), shape


def test_captions_state_exactly_what_is_there():
    for scene in SCENES:
        caption = shapes.describe(scene)
        groups, _, background = parse(caption)
        assert sum(group["count"] for group in groups) == len(scene.things), caption
        assert len({group["class"] for group in groups}) == len(groups), caption
        for group in groups:
            count = group.pop("count")
            assert len(things(scene, **group)) == len(things(scene, **{"class": group["class"]})) == count, caption
            assert "size" in group or {thing["size"] for thing in things(scene, **group)} == {"medium"}, caption
        assert scene.background == (background or "white"), caption
        assert not re.search(r"\ba [aeiou]|\ban [^aeiou]", caption), caption


def test_relations_hold_and_no_other_does():
    seen = Counter()
    for scene in scenes(2400):
        groups, relation, _ = parse(shapes.describe(scene))
        assert (relation is not None) == (scene.tag == "position")
        if relation:
            first, second = (things(scene, **{"class": group["class"]})[0] for group in groups)
            assert relations(first, second) == {relation}, shapes.describe(scene)
            axis, sign = (
                ("x" if relation in ("left of", "right of") else "y"),
                -1 if relation in ("left of", "above") else 1,
            )
            along = sign * (first[axis] - second[axis])
            assert along > first["radius"] + second["radius"] + 4, "no clear gap along the axis"
            seen[relation] += 1
    assert min(seen[relation] for relation in shapes.RELATIONS) > 50 and sum(seen.values()) >= 250


def test_size_words_differ_clearly():
    bands = [shapes.RADII[size] for size in ("small", "medium", "large")]
    assert all(lower[1] * 1.2 < upper[0] for lower, upper in itertools.pairwise(bands))
    for scene in SCENES:
        for thing in scene.things:
            low, high = shapes.RADII[thing.size]
            assert low <= thing.radius <= high
        sizes = {thing.size for thing in scene.things}
        assert len(sizes) == 1 or sizes == {"small", "large"}


def test_colours_differ_clearly():
    assert min(math.dist(a, b) for a, b in itertools.combinations(shapes.PALETTE.values(), 2)) > 90
    for scene in SCENES:
        assert scene.background not in {thing.colour for thing in scene.things}
        classes = {thing.shape: thing.colour for thing in scene.things}
        assert len(set(classes.values())) == len(classes), "two classes share a colour"


def test_include_agrees_with_the_caption_and_the_objects():
    for scene in SCENES:
        include = json.loads(json.dumps(shapes.claims(scene)))
        groups, relation, background = parse(shapes.describe(scene))
        if background:
            assert include.pop() == {"class": "background", "count": 1, "color": background}
        if relation:
            assert include[1].pop("position") == [relation, 0]
            include.reverse()
        assert include == groups
        for entry in include:
            count = entry.pop("count")
            assert len(things(scene, **entry)) == count
        assert sum(len(things(scene, **entry)) for entry in include) == len(scene.things)


def test_include_spells_geneval():
    blue = shapes.Thing("small", "blue", "star", 0.3, 0.8, 0.12)
    orange = shapes.Thing("large", "orange", "cross", 0.3, 0.3, 0.23)
    scene = shapes.Scene("position", "black", (orange, blue), True, True, "above")
    assert shapes.describe(scene) == "a large orange cross above a small blue star on a black background"
    assert shapes.claims(scene) == [
        {"class": "star", "count": 1, "color": "blue", "size": "small"},
        {"class": "cross", "count": 1, "color": "orange", "size": "large", "position": ["above", 0]},
        {"class": "background", "count": 1, "color": "black"},
    ]
    assert shapes.ground_truth(scene, 64) == {
        "background": "black",
        "shapes": [
            {"class": "cross", "color": "orange", "size": "large", "x": 19.5, "y": 19.5, "radius": 14.72},
            {"class": "star", "color": "blue", "size": "small", "x": 19.5, "y": 51.5, "radius": 7.68},
        ],
    }


@pytest.mark.parametrize(
    ("count", "names_colours", "caption"),
    [
        (1, False, "a cross"),
        (1, True, "an orange cross"),
        (2, False, "two crosses"),
        (4, True, "four orange crosses"),
    ],
)
def test_grammar(count, names_colours, caption):
    thing = shapes.Thing("medium", "orange", "cross", 0.5, 0.5, 0.16)
    assert shapes.describe(shapes.Scene("counting", "white", (thing,) * count, names_colours, False)) == caption


@pytest.mark.process
def test_tasks_shapes_and_colours_are_evenly_mixed():
    many = scenes(4000, "even")
    for label, share, seen in (
        ("tag", 1 / len(shapes.TASKS), Counter(scene.tag for scene in many)),
        ("shape", 1 / len(shapes.SHAPES), Counter(scene.things[0].shape for scene in many)),
        ("colour", 1 / len(shapes.PALETTE), Counter(scene.things[0].colour for scene in many)),
    ):
        deviation = math.sqrt(len(many) * share * (1 - share))
        assert len(seen) == round(1 / share), label
        assert all(abs(count - len(many) * share) < 4 * deviation for count in seen.values()), (label, seen)


def table(split):
    return split.data.table.to_pydict()


def test_same_seed_same_bytes_and_a_longer_set_begins_with_the_shorter():
    short = shapes.build(32, 10, 5, seed=3)
    long, again, other = (shapes.build(32, 20, 5, seed=seed) for seed in (3, 3, 4))
    assert table(long["train"]) == table(again["train"])
    assert table(long["validation"]) == table(again["validation"]) == table(short["validation"])
    assert table(long["train"].select(range(10)).flatten_indices()) == table(short["train"])
    assert not {row["objects"] for row in long["train"]} & {row["objects"] for row in other["train"]}
    assert not set(long["train"]["objects"]) & set(long["validation"]["objects"])


def test_held_out_combinations_occur_in_validation_alone():
    hidden = set(shapes.held_out_combinations(7, seed=0))
    assert len(hidden) == 7 and len({c for c, _ in hidden}) == 7 and len({s for _, s in hidden}) == 7
    assert len(set(shapes.held_out_combinations(len(shapes.COMBINATIONS), 0))) == len(shapes.COMBINATIONS) == 70
    splits = shapes.build(16, 300, 300, seed=0, held_out=7)
    plain = shapes.build(16, 0, 300, seed=0)
    used = {
        name: {(thing["color"], thing["class"]) for text in split["objects"] for thing in json.loads(text)["shapes"]}
        for name, split in splits.items()
    }
    assert used["train"] == set(shapes.COMBINATIONS) - hidden
    assert hidden <= used["validation"]
    assert table(splits["validation"]) == table(plain["validation"])


def test_places_and_sizes_may_be_few():
    """Centres on a grid and one radius for a size word; what captions say of them still holds."""
    few = [shapes.sample_scene(random.Random(f"places/{i}"), places=16) for i in range(200)]
    for scene in few:
        for thing in scene.things:
            assert (thing.x * 16) % 1 == (thing.y * 16) % 1 == 0
            assert thing.radius == sum(shapes.RADII[thing.size]) / 2
        if scene.relation:
            assert shapes.holds(scene.relation, *scene.things)
    assert {scene.tag for scene in few} == set(shapes.TASKS)
    rows = list(shapes.rows("test", 20, SIZE, 0, shapes.COMBINATIONS, "flat", 16))
    assert any(row["objects"] != other["objects"] for row, other in zip(rows, shapes.rows("test", 20, SIZE, 0,
               shapes.COMBINATIONS, "flat", None), strict=True))  # fmt: skip


def test_scenes_of_some_tasks(tmp_path, monkeypatch):
    """One task for all scenes; with all tasks named the rows are those of a command that names none."""
    monkeypatch.setattr(shapes, "tqdm", lambda rows, desc: rows)
    command = ["--train", "30", "--validation", "0", "--size", "16", "--tasks"]
    shapes.main(["--out", str(tmp_path / "some"), *command, "color_attr", "background"])
    assert set(datasets.load_from_disk(tmp_path / "some")["train"]["tag"]) == {"color_attr", "background"}
    card = (tmp_path / "some" / "README.md").read_text(encoding="utf-8")
    assert "--style flat --tasks color_attr background`" in card and "`tag`: `color_attr`, `background`." in card
    shapes.main(["--out", str(tmp_path / "all"), *command, *shapes.TASKS])
    assert table(datasets.load_from_disk(tmp_path / "all")["train"]) == table(shapes.build(16, 30, 0, 0)["train"])
    with pytest.raises(SystemExit):
        shapes.main(["--out", str(tmp_path / "none"), *command, "numbers"])


def test_held_out_captions_are_in_validation_alone():
    """A share of all captions, whatever the seed: rows of other captions are those of a set without."""
    some = shapes.build(16, 300, 100, 0, tasks=["attributes"], held_out_captions=0.2)
    plain = shapes.build(16, 300, 0, 0, tasks=["attributes"])
    trained, tested = set(some["train"]["caption"]), set(some["validation"]["caption"])
    assert not trained & tested and len(tested) > 50
    assert all(shapes.is_held_out(caption, 0.2) for caption in tested)
    free = [i for i, caption in enumerate(plain["train"]["caption"]) if not shapes.is_held_out(caption, 0.2)]
    assert 210 < len(free) < 270
    assert table(some["train"].select(free).flatten_indices()) == table(plain["train"].select(free).flatten_indices())


def test_one_thing_of_which_everything_is_said():
    many = [shapes.sample_scene(random.Random(f"one/{i}"), tasks=["attributes"]) for i in range(300)]
    for scene in many:
        (thing,) = scene.things
        size = "" if thing.size == "medium" else f"{thing.size} "
        said = f"a {size}{thing.colour} {thing.shape} on a {scene.background} background"
        assert shapes.describe(scene).replace("an ", "a ") == said and thing.colour != scene.background
        assert len(shapes.claims(scene)) == 2
    assert {scene.things[0].size for scene in many} == {"small", "medium", "large"}


def test_the_command_writes_a_folder_that_datasets_opens(tmp_path, monkeypatch):
    monkeypatch.setattr(
        sys, "argv", ["prepare_shapes.py", "--out", str(tmp_path / "out"), "--train", "12", "--validation", "0"]
    )
    shapes.main()
    splits = datasets.load_from_disk(tmp_path / "out")
    assert {name: len(split) for name, split in splits.items()} == {"train": 12}
    assert splits["train"].column_names == ["image", "caption", "tag", "include", "objects"]
    scene = shapes.sample_scene(random.Random("0/train/11"))
    row = splits["train"][11]
    assert row["image"].format == "PNG" and row["image"].tobytes() == shapes.draw(scene, 64).tobytes()
    assert row["caption"] == shapes.describe(scene) and row["tag"] == scene.tag
    assert json.loads(row["objects"]) == shapes.ground_truth(scene, 64)
    assert json.loads(row["include"]) == shapes.claims(scene)
    raw = splits["train"].cast_column("image", datasets.Image(decode=False))[11]["image"]["bytes"]
    assert Image.open(io.BytesIO(raw)).size == (64, 64)
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert card.startswith("---\nlicense: cc0-1.0\n") and "only validation has: none." in card
    assert "--size 64 --train 12 --validation 0 --seed 0" in card and "yellow (255, 230, 40)" in card


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"size": 15}, "size is 15, which is too small: use --size 16 or more"),
        ({"train": -1}, "train is -1, which is too small: use --train 0 or more"),
        ({"validation": -2}, "validation is -2, which is too small: use --validation 0 or more"),
        ({"held_out": 36}, "hold-out-combinations is 36, which is out of range: use --hold-out-combinations 0 to 35"),
        ({"places": 15}, "places is 15, which is out of range: use --places 16 to the size, 64"),
        ({"held_out_captions": 0.6}, "hold-out-captions is 0.6, which is out of range: use a share of 0 to 0.5"),
        ({"places": 65}, "places is 65, which is out of range: use --places 16 to the size, 64"),
        ({"held_out": -1}, "hold-out-combinations is -1, which is out of range: use --hold-out-combinations 0 to 35"),
    ],
)
def test_bad_settings_name_the_field_the_value_and_the_fix(change, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        shapes.build(**({"size": 64, "train": 1, "validation": 1, "seed": 0} | change))

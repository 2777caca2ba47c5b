"""Lists of shapes in words: every order and every answer is what the list says."""

import re
from collections import Counter

import datasets
import pytest

import prepare_shapes_lists as lists
from unified.conversation import read_messages


def test_orders_and_answers_are_those_of_the_list():
    asked, lengths = Counter(), Counter()
    for row in lists.build(200, 0, seed=0, most=5, asked=4)["train"]:
        said = [turn.parts[0] for turn in read_messages(row["messages"], row["images"])]
        text, _, said[0] = said[0].partition(". ")
        listed = [tuple(thing.split()) for thing in text.split(", ")]
        lengths[len(listed)] += 1
        for column in (1, 2):  # color and shape tell one from another
            assert len({thing[column] for thing in listed}) == len(listed)
        for order, reply in zip(said[:4:2], said[1:4:2], strict=True):
            first, second = (1, 2) if order == "list by color." else (2, 1)
            assert reply == ", ".join(sorted(" ".join((thing[first], thing[second], thing[0])) for thing in listed))
            asked[order] += 1
        for question, answer in zip(said[4::2], said[5::2], strict=True):
            kind, named = re.fullmatch(r"(?:what|which) (\w+) is (?:the )?(\w+)\?", question).groups()
            (thing,) = [thing for thing in listed if named in thing[1:]]
            assert answer == thing[["size", "color", "shape"].index(kind)]
            asked[kind] += 1
    assert set(lengths) == {2, 3, 4, 5} and asked["list by color."] == asked["list by shape."] == 200
    assert min(asked[kind] for kind in ("color", "size", "shape")) > 200


def test_the_command_writes_a_folder_that_datasets_opens(tmp_path, capsys):
    lists.main(["--out", str(tmp_path / "out"), "--train", "3", "--validation", "2", "--seed", "4"])
    splits = datasets.load_from_disk(tmp_path / "out")
    assert splits["train"].to_list() == lists.build(5, 2, seed=4)["train"].to_list()[:3]
    assert splits["train"].to_list()[:2] != splits["validation"].to_list()
    assert "3 train conversations" in capsys.readouterr().out


@pytest.mark.parametrize(("field", "value", "message"), [
    ("train", -1, "train is -1, which is too small: use --train 0 or more"),
    ("asked", -1, "questions is -1, which is too small: use --questions 0 or more"),
    ("most", 1, "most is 1, which is out of range: use --most 2 to"),
    ("most", 99, "most is 99, which is out of range: use --most 2 to"),
])  # fmt: skip
def test_numbers_out_of_range_name_the_field_and_the_fix(field, value, message):
    with pytest.raises(ValueError, match=message):
        lists.build(**{"train": 1, "validation": 0, "seed": 0, field: value})

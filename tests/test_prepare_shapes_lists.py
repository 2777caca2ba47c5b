"""Lists of shapes in words: every order and every answer is what the list says."""

import re
from collections import Counter

import datasets
import pytest

import prepare_shapes_lists as lists
from unified.conversation import read_messages

NUMBERS = ["zero", "one", "two", "three", "four"]


def answer_of(question, listed):
    """The answer by the words of the list alone, independently of the recipe."""
    words = re.findall(r"\w+", question)
    if words[:2] == ["how", "many"]:
        return NUMBERS[sum(shape in (words[2][:-1], words[2][:-2]) for _, _, shape in listed)]
    if words[0] == "is":
        return "yes" if tuple(words[-2:]) in {thing[1:] for thing in listed} else "no"
    wanted = {"color": 1, "size": 0, "shape": 2}[words[1]]
    (found,) = {thing[wanted] for thing in listed if words[-1] in thing}
    return found


def test_orders_and_answers_are_those_of_the_list():
    asked, lengths = Counter(), Counter()
    for row in lists.build(200, 0, seed=0, asked=4)["train"]:
        said = [turn.parts[0] for turn in read_messages(row["messages"], row["images"])]
        text, _, said[0] = said[0].partition(". ")
        listed = [tuple(thing.split()) for thing in text.split(", ")]
        lengths[len(set(listed))] += 1
        assert {len(set(column)) for column in list(zip(*set(listed), strict=True))[1:]} == {len(set(listed))}
        for order, reply in zip(said[:4:2], said[1:4:2], strict=True):
            first, second = (1, 2) if order == "sort by color." else (2, 1)
            things = [" ".join((thing[first], thing[second], thing[0])) for thing in listed]
            assert reply == ", ".join(sorted(things))
            asked[order] += 1
        assert len(set(said[4::2])) == len(said[4::2]) == 4
        for question, answer in zip(said[4::2], said[5::2], strict=True):
            assert answer == answer_of(question, listed), (text, question)
            asked[re.match(r"(how many|\w+ \w+)", question)[0]] += 1
    assert set(lengths) == set(range(2, 8)) and asked["sort by color."] == asked["sort by shape."] == 200
    for kind in ("how many", "is there", "what color", "what size", "which shape"):
        assert asked[kind] > 100


def test_the_command_writes_a_folder_that_datasets_opens(tmp_path, capsys):
    lists.main(["--out", str(tmp_path / "out"), "--train", "3", "--validation", "2", "--seed", "4"])
    splits = datasets.load_from_disk(tmp_path / "out")
    assert splits["train"].to_list() == lists.build(5, 2, seed=4, asked=4)["train"].to_list()[:3]
    assert splits["train"].to_list()[:2] != splits["validation"].to_list()
    assert "3 train conversations" in capsys.readouterr().out


@pytest.mark.parametrize("field", ["train", "validation", "questions"])
def test_negative_numbers_name_the_field_and_the_fix(field):
    numbers = {"train": 1, "validation": 0, "questions": 1} | {field: -1}
    with pytest.raises(ValueError, match=f"{field} is -1, which is too small: use --{field} 0 or more"):
        lists.build(numbers["train"], numbers["validation"], seed=0, asked=numbers["questions"])

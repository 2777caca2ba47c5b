"""Questions about shapes: every answer is exact, and no wording is tied to one."""

import json
import random
import re
import sys
from collections import Counter, defaultdict

import datasets
import pytest

import prepare_shapes_chat as chat
from unified.conversation import read_messages

KINDS = len(chat.ANSWERS)
NAMES = {shape + ("es" if shape == "cross" else "s"): shape for shape in chat.SHAPES}


def answer_of(question, truth):
    """The answer by the ground truth in pixels, independently of the recipe; None where the question has none."""
    shapes = truth["shapes"]
    words = re.findall(r"\w+", question)
    named = [thing for word in words for thing in shapes if thing["class"] == word]
    if words[:2] == ["how", "many"]:
        number = sum(thing["class"] == NAMES[words[2]] for thing in shapes)
        return ["zero", "one", "two", "three", "four"][number]
    if words[-1] == "background":
        return truth["background"]
    if words[:2] == ["what", "color"]:
        return named[0]["color"] if len(named) == 1 else None
    if words[:2] == ["what", "size"]:
        return named[0]["size"] if len(named) == 1 else None
    if words[0] == "which":
        found = {thing["class"] for thing in shapes if thing["color"] == words[-1]}
        return found.pop() if len(found) == 1 else None
    if words[0] == "is":
        return "yes" if any([thing["color"], thing["class"]] == words[-2:] for thing in shapes) else "no"
    first, second = named
    dx, dy = first["x"] - second["x"], first["y"] - second["y"]
    return ("left" if dx < 0 else "right") if abs(dx) > abs(dy) else ("above" if dy < 0 else "below")


def scenes(count):
    return [chat.sample_scene(random.Random(f"chat test/{i}")) for i in range(count)]


def test_every_answer_is_exact_and_the_only_one():
    asked = Counter()
    for scene in scenes(200):
        truth = chat.ground_truth(scene, 64)
        found = list(chat.questions(scene))
        for question in found:
            assert question.answer == answer_of(question.text, truth), (question, truth)
            assert question.answer in chat.ANSWERS[question.kind]
            asked[question.kind] += 1
        assert len({question.text for question in found}) == len(set(found))
    assert set(asked) == set(chat.ANSWERS)


def test_first_questions_have_all_answers_equally_often():
    count = 10 * KINDS
    made = [chat.first_question(random.Random(f"balance/{i}"), i) for i in range(count)]
    by_kind = defaultdict(Counter)
    for _, question in made:
        by_kind[question.kind][question.answer] += 1
    for kind, answers in chat.ANSWERS.items():
        assert sum(by_kind[kind].values()) == 10
        assert all(10 // len(answers) <= by_kind[kind][answer] <= -(-10 // len(answers)) for answer in answers), kind


def test_a_question_alone_does_not_tell_its_answer():
    """The best guess from the wording, learned on half of the questions, is about as good as that from the kind."""
    rng = random.Random(0)
    for kind in ("size", "count", "exists"):
        number = list(chat.ANSWERS).index(kind)
        made = [chat.first_question(rng, number + KINDS * i)[1] for i in range(400 if kind != "count" else 200)]
        seen, held_out = defaultdict(Counter), made[1::2]
        for question in made[::2]:
            seen[question.text][question.answer] += 1
        right = sum(seen[q.text].most_common(1)[0][0] == q.answer for q in held_out if seen[q.text])
        assert right / len(held_out) < 1 / len(chat.ANSWERS[kind]) + 0.15, kind


def test_no_question_gives_another_away():
    rng = random.Random(0)
    for number in range(60):
        scene, first = chat.first_question(rng, number)
        asked = [first, *chat.further_questions(rng, scene, first, 3)]
        assert len({question.kind for question in asked}) == len(asked)
        named = [set(re.findall(r"\w+", f"{q.text} {q.answer}")) & set(chat.PALETTE) for q in asked]
        assert sum(map(len, named)) == len(set().union(*named))


@pytest.mark.parametrize("drawn", [False, True])
def test_rows_are_conversations(drawn):
    splits = chat.build(32, 40, 7, seed=3, drawn=drawn)
    again = chat.build(32, 20, 7, seed=3, drawn=drawn)
    assert splits["train"].select(range(20)).to_list() == again["train"].to_list()
    endings = Counter()
    for split, rows in splits.items():
        for row in rows:
            turns = read_messages(row["messages"], row["images"])
            truth, said = json.loads(row["objects"]), [turn.parts[-1] for turn in turns]
            assert [turn.role for turn in turns] == ["user", "assistant"] * (len(turns) // 2)
            assert row["images"][0].size == (32, 32)
            if drawn:
                assert said[0] == f"draw {row['caption']}." and turns[1].parts == (row["images"][0],)
                said = said[2:]
            else:
                assert turns[0].parts[0] == row["images"][0]
            whole = [
                f"{t['size']} {t['color']} {t['class']}"
                for t in sorted(truth["shapes"], key=lambda t: (t["y"], t["x"]))
            ]
            last = {chat.DESCRIBE: row["caption"], chat.LIST: ", ".join(whole)}
            if said[-2] in last:
                endings[said[-2]] += 1
                assert said[-1] == last[said[-2]]
                said = said[:-2]
            assert all(answer_of(q, truth) == a for q, a in zip(said[::2], said[1::2], strict=True))
            assert len(said) == 2 if split == "validation" else 2 <= len(said) <= 6
    assert endings[chat.LIST] > 10 and (endings[chat.DESCRIBE] > 4) != drawn


@pytest.mark.parametrize("drawn", [False, True])
def test_without_questions_a_row_asks_for_the_list_alone(drawn):
    rows = chat.build(32, 6, 7, seed=0, asked=0, drawn=drawn)
    for row in rows["train"]:
        said = [turn.parts[-1] for turn in read_messages(row["messages"], row["images"])]
        assert len(said) == 2 + 2 * drawn and said[-2] == chat.LIST
        assert said[-1].count(",") + 1 == len(json.loads(row["objects"])["shapes"])
    assert set(rows["validation"]["kind"]) == set(chat.ANSWERS)


@pytest.mark.parametrize("drawn", [False, True])
def test_the_list_comes_first_in_training_rows(drawn):
    splits = chat.build(32, 14, 7, seed=0, asked=2, drawn=drawn, list_first=True)
    plain = chat.build(32, 14, 7, seed=0, asked=2, drawn=drawn)
    for row, other in zip(splits["train"], plain["train"], strict=True):
        said, same = (
            [turn.parts[-1] for turn in read_messages(r["messages"], r["images"])][2 * drawn :] for r in (row, other)
        )
        assert said[0] == chat.LIST and said[1].count(",") + 1 == len(json.loads(row["objects"])["shapes"])
        assert said[2:] == same[: len(said) - 2]
    assert splits["validation"].to_list() == plain["validation"].to_list()


def test_places_are_those_of_the_scenes():
    truths = [json.loads(row["objects"]) for row in chat.build(32, 0, 14, seed=0, places=16)["validation"]]
    shapes = [shape for truth in truths for shape in truth["shapes"]]
    assert all((shape[axis] - 0.5) % 2 == 0 for shape in shapes for axis in "xy")  # 16 places on 32 pixels
    assert len({(shape["size"], shape["radius"]) for shape in shapes}) == len({shape["size"] for shape in shapes})


def test_the_command_writes_a_folder_that_datasets_opens(tmp_path, monkeypatch):
    arguments = ["--out", str(tmp_path / "out"), "--size", "16", "--train", "0", "--validation", "7", "--draw",
                 "--places", "16"]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["prepare_shapes_chat.py", *arguments])
    chat.main()
    splits = datasets.load_from_disk(tmp_path / "out")
    assert list(splits) == ["validation"] and splits["validation"]["kind"] == list(chat.ANSWERS)
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert (
        "--size 16 --train 0 --validation 7 --seed 0\n--questions 3 --draw --places 16`" in card
        and "`exists`: yes, no" in card
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"size": 15}, "size is 15, which is too small: use --size 16 or more"),
        ({"train": -1}, "train is -1, which is too small"),
        ({"validation": -1}, "validation is -1, which is too small"),
        ({"asked": -1}, "questions is -1, which is out of range: use --questions 0 to 7"),
        ({"asked": 8}, "questions is 8, which is out of range"),
        ({"places": 33}, "places is 33, which is out of range: use --places 16 to the size, 32"),
    ],
)
def test_bad_settings_name_the_field_the_value_and_the_fix(change, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        chat.build(**({"size": 32, "train": 1, "validation": 1, "seed": 0} | change))

"""Prepare conversations about procedural scenes of coloured shapes: exact questions and answers, descriptions, drawings.

    python recipes/prepare_shapes_chat.py --out data/shapes_chat --size 32 --train 40000 --validation 1400
    python recipes/prepare_shapes_chat.py --out data/shapes_draw --size 32 --train 20000 --draw

Each row holds `images` (one), `messages` in transformers' format, and the `kind` of its first question, the scene's `caption`
and its `objects` (every shape, exact). The user shows an image, or with --draw asks for one, and asks about it; a share of
the training rows ends with a description, which is the caption, and another with a list of all shapes, from top to bottom.
With --list-first every training row begins with the list, so that a model learns to look before it answers.
The scenes are those of `prepare_shapes.py`, sampled until one has the wanted answer: first questions go through all kinds
and all answers of each, equally often, so that a model that does not look at the image is right about as often as 1 / answers.
Validation rows have one question each.

Row i of a split depends on the seed, the split and i alone. Made by code and free to use (CC0-1.0).
"""

import argparse
import io
import json
import random
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import permutations
from pathlib import Path
from typing import Any, NamedTuple

import datasets
from tqdm import tqdm
from unified_recipes.prepare_shapes import (
    MIN_SIZE,
    PALETTE,
    RADII,
    RELATIONS,
    SHAPES,
    Scene,
    Thing,
    add_places_argument,
    check_numbers,
    describe,
    draw,
    ground_truth,
    holds,
    make_splits,
    sample_scene,
)

from unified.errors import explain_errors

COUNTS = ("zero", "one", "two", "three", "four")
# The kinds of questions and their answers.
ANSWERS: dict[str, tuple[str, ...]] = {
    "count": COUNTS, "color": tuple(PALETTE), "shape": SHAPES, "size": tuple(RADII),
    "relation": tuple(name.removesuffix(" of") for name in RELATIONS), "background": tuple(PALETTE), "exists": ("yes", "no"),
}  # fmt: skip
DESCRIBE, LIST, DRAW = "describe the image.", "list the shapes.", "draw {caption}."
# Shares of the training rows that end with a description, or with a list: its words tell more of an image than answers do.
DESCRIBED, LISTED = 0.25, 0.5


class Question(NamedTuple):
    """A question about a scene: its kind, words and only answer."""

    kind: str
    text: str
    answer: str


def questions(scene: Scene) -> Iterator[Question]:
    """All questions about a scene; no wording is tied to an answer.

    Attributes are asked of single shapes, whose word no other shape shares; sizes of several shapes would not be free.
    """
    counts = Counter(thing.shape for thing in scene.things)
    colours = {thing.shape: thing.colour for thing in scene.things}  # those of one class share size and colour
    for shape in SHAPES:
        yield Question("count", f"how many {_plural(shape)} are there?", COUNTS[counts[shape]])
    yield Question("background", "what color is the background?", scene.background)
    alone = [thing for thing in scene.things if counts[thing.shape] == 1]
    for thing in alone:
        yield from attribute_questions(thing)
    for first, second in permutations(alone, 2):
        for relation in RELATIONS:
            if holds(relation, first, second):
                text = f"where is the {first.shape} relative to the {second.shape}?"
                yield Question("relation", text, relation.removesuffix(" of"))
    for shape, colour in colours.items():
        yield Question("exists", f"is there a {colour} {shape}?", "yes")
        for other in PALETTE:  # right in one of the two
            if other != colour:
                yield Question("exists", f"is there a {other} {shape}?", "no")
        for wrong in SHAPES:
            if colours.get(wrong) != colour:
                yield Question("exists", f"is there a {colour} {wrong}?", "no")


def attribute_questions(thing: Thing) -> list[Question]:
    """What is asked of a shape whose word and colour no other one has."""
    return [
        Question("color", f"what color is the {thing.shape}?", thing.colour),
        Question("size", f"what size is the {thing.shape}?", thing.size),
        Question("shape", f"which shape is {thing.colour}?", thing.shape),
    ]


def _plural(shape: str) -> str:
    return shape + ("es" if shape.endswith("s") else "s")


@cache
def _frequencies() -> Counter[tuple[str, str]]:
    """In how many of many scenes each kind has each answer."""
    rng = random.Random("frequencies")
    found: Counter[tuple[str, str]] = Counter()
    for _ in range(2000):
        found.update({question[::2] for question in questions(sample_scene(rng))})
    return found


def first_question(rng: random.Random, number: int, places: int | None = None) -> tuple[Scene, Question]:
    """A scene, and question ``number`` of a series in which kinds take turns, and so do the answers of each.

    ``places`` is that of :func:`unified_recipes.prepare_shapes.arrange`.
    """
    kinds = list(ANSWERS)
    kind = kinds[number % len(kinds)]
    answer = ANSWERS[kind][number // len(kinds) % len(ANSWERS[kind])]
    while True:
        scene = sample_scene(rng, places=places)
        fitting = [question for question in questions(scene) if question[::2] == (kind, answer)]
        if fitting:
            return scene, rng.choice(fitting)


def further_questions(rng: random.Random, scene: Scene, first: Question, count: int) -> list[Question]:
    """Up to ``count`` questions of other kinds, rare answers before common ones, none that an earlier one gives away."""
    left, chosen = list(questions(scene)), [first]
    while len(chosen) <= count:
        left = [question for question in left if not _given_away(question, chosen[-1])]
        if not left:
            break
        answers = sorted({question[::2] for question in left})
        wanted = rng.choices(answers, [1 / (1 + _frequencies()[answer]) for answer in answers])[0]
        chosen.append(rng.choice([question for question in left if question[::2] == wanted]))
    return chosen[1:]


def _given_away(question: Question, earlier: Question) -> bool:
    """Whether an earlier question and its answer tell this one's: they name the same color, or the shape that is counted."""
    mine, theirs = (set(re.findall(r"\w+", f"{each.text} {each.answer}")) for each in (question, earlier))
    counted = question.kind == "count" and any(_plural(word) in mine for word in theirs)
    return question.kind == earlier.kind or counted or not mine.isdisjoint(theirs & set(PALETTE))


def listed(scene: Scene) -> str:
    """Every shape with its size and colour, from top to bottom: ``small red star, large blue circle``."""
    things = sorted(scene.things, key=lambda thing: (thing.y, thing.x))
    return in_words(things)


def in_words(things: Sequence[Thing], words: Sequence[str] = Thing._fields[:3]) -> str:
    """``small red star, large blue circle``, or with the words of each in another order."""
    return ", ".join(" ".join(getattr(thing, word) for word in words) for thing in things)


def turn(role: str, *parts: str | None) -> dict[str, Any]:
    """A message of texts, and None in the place of an image."""
    content = [{"type": "image", "text": None} if part is None else {"type": "text", "text": part} for part in parts]
    return {"role": role, "content": content}


def as_turns(exchanges: Sequence[tuple[str, str | None]]) -> list[dict[str, Any]]:
    """Messages of what the user says and the reply, in turn."""
    return [
        turn(role, text) for exchange in exchanges for role, text in zip(("user", "assistant"), exchange, strict=True)
    ]


def conversation(scene: Scene, said: Sequence[tuple[str, str]], drawn: bool) -> list[dict[str, Any]]:
    """Messages: the image from the user, or from the assistant where it is ``drawn``; what the two said of it, in turns."""
    asked_for = [(DRAW.format(caption=describe(scene)), None)] if drawn else []
    exchanges: list[tuple[str, str | None]] = [*asked_for, *said]
    messages = as_turns(exchanges)
    if not drawn:
        messages[0] = turn("user", None, exchanges[0][0])
    return messages


def training_exchanges(
    rng: random.Random, scene: Scene, first: Question, asked: int, drawn: bool, list_first: bool
) -> list[tuple[str, str]]:
    """Questions and answers of a training row behind the list of shapes, or before a description or a list in some rows.

    Without questions it is the list alone.
    """
    if not asked:
        return [(LIST, listed(scene))]
    said = [question[1:] for question in (first, *further_questions(rng, scene, first, asked - 1))]
    if list_first:
        return [(LIST, listed(scene)), *said]
    # The caption of an image that was asked for has been said already.
    endings = [None if drawn else (DESCRIBE, describe(scene)), (LIST, listed(scene)), None]
    ending = rng.choices(endings, [DESCRIBED, LISTED, 1 - DESCRIBED - LISTED])[0]
    return [*said, ending] if ending else said


def rows(
    split: str, count: int, size: int, seed: int, asked: int, drawn: bool, list_first: bool, places: int | None
) -> Iterator[dict[str, Any]]:
    """Yield the rows of a split. Row i has its own random stream, made from seed, split and i."""
    for i in tqdm(range(count), desc=f"render {split}"):
        rng = random.Random(f"{seed}/chat/{split}/{i}")
        scene, first = first_question(rng, i, places)
        said = [first[1:]]
        if split == "train":
            said = training_exchanges(rng, scene, first, asked, drawn, list_first)
        png = io.BytesIO()
        draw(scene, size).save(png, format="PNG")
        yield {
            "images": [{"bytes": png.getvalue(), "path": None}],
            "messages": conversation(scene, said, drawn),
            "kind": first.kind,
            "caption": describe(scene),
            "objects": json.dumps(ground_truth(scene, size)),
        }


def build(
    size: int,
    train: int,
    validation: int,
    seed: int,
    asked: int = 3,
    drawn: bool = False,
    list_first: bool = False,
    places: int | None = None,
) -> datasets.DatasetDict:
    """Make the splits that have rows.

    Raises:
        ValueError: if a number is too small or too large.
    """
    check_numbers(size, train, validation, places)
    if not 0 <= asked <= len(ANSWERS):
        raise ValueError(f"questions is {asked}, which is out of range: use --questions 0 to {len(ANSWERS)}, the kinds")
    text = datasets.Value("string")
    content = datasets.List({"type": text, "text": text})
    features = datasets.Features(
        images=datasets.List(datasets.Image()), messages=datasets.List({"role": text, "content": content}), kind=text,
        caption=text, objects=text,
    )  # fmt: skip

    def of_split(split: str, count: int) -> Iterator[dict[str, Any]]:
        return rows(split, count, size, seed, asked, drawn, list_first, places)

    return make_splits({"train": train, "validation": validation}, of_split, features)


CARD = """---
license: cc0-1.0
task_categories: [visual-question-answering, image-to-text, text-to-image]
---
# Conversations about coloured shapes, {size} px

{train} conversations for training, {validation} for validation, about as many procedural scenes.
Made with `recipes/prepare_shapes_chat.py --size {size} --train {train} --validation {validation} --seed {seed}
--questions {asked}{flags}`.

- `messages`: turns in transformers' format; `images`: their one image.
- `kind`: of the first question; the kinds and their answers: {kinds}. First questions have all kinds, and all answers of
  each kind, equally often.
- `caption`, `objects`: what `recipes/prepare_shapes.py` says of a scene.
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line and write the folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument(
        "--size", type=int, default=64, help=f"side of the images in pixels, {MIN_SIZE} or more (default: %(default)s)"
    )
    parser.add_argument("--train", type=int, default=4096, help="conversations to train on (default: %(default)s)")
    parser.add_argument("--validation", type=int, default=700, help="conversations held out (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of all random streams (default: %(default)s)")
    parser.add_argument(
        "--questions",
        type=int,
        default=3,
        dest="asked",
        help="of a training row, each of another kind; 0: it asks for the list of all shapes alone (default: %(default)s)",
    )
    parser.add_argument(
        "--draw", action="store_true", dest="drawn", help="the user asks for the image, and then about it"
    )
    parser.add_argument(
        "--list-first",
        action="store_true",
        help="training rows begin with the list of all shapes, before the questions",
    )
    add_places_argument(parser)
    args = parser.parse_args(argv)
    settings = {k: v for k, v in vars(args).items() if k != "out"}
    splits = build(**settings)
    splits.save_to_disk(args.out)
    kinds = "; ".join(f"`{kind}`: {', '.join(answers)}" for kind, answers in ANSWERS.items())
    flags = (
        " --draw" * args.drawn
        + " --list-first" * args.list_first
        + ("" if args.places is None else f" --places {args.places}")
    )
    card = CARD.format(**settings, kinds=kinds, flags=flags)
    (args.out / "README.md").write_text(card, encoding="utf-8")
    for split, part in splits.items():
        print(f"{args.out}: {len(part)} {split} conversations, {dict(sorted(Counter(part['kind']).items()))}")


if __name__ == "__main__":
    explain_errors(main)

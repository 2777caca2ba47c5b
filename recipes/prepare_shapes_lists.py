"""Prepare conversations in words alone about shapes that the user lists: put them in order, and answer questions.

    python recipes/prepare_shapes_lists.py --out data/shapes_lists --train 24000

They go beside those of `prepare_shapes_chat.py`, with the same questions, and teach to look things up. A scene has two kinds of
shapes at most, so that an answer which is one of the list's two is right half the time, and a model stops there; here are up to
seven. Putting them in order asks for a look at the list with every word, where a question asks once:

    user       large blue circle, small red star, small pink heart. sort by color.
    assistant  blue circle large, pink heart small, red star small
    user       sort by shape.
    assistant  circle blue large, heart pink small, star red small
    user       what color is the heart?
    assistant  pink

Rows hold `images` (none), `messages` and `kind`, as those of `prepare_shapes_chat.py`; row i depends on the seed and i alone. Made
by code and free to use (CC0-1.0).
"""

import argparse
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
from tqdm import tqdm
from unified_recipes.prepare_shapes import PALETTE, RADII, SHAPES, Scene, Thing, make_splits
from unified_recipes.prepare_shapes_chat import Question, in_words, questions, turn

from unified.errors import explain_errors

KINDS = ("count", "color", "shape", "size", "exists")  # of questions that a list answers
MOST = 7  # kinds of shapes in a list
REPEATED = (1, 1, 1, 2, 3)  # how often a shape may be in it
ORDERS = {"color": ("colour", "shape", "size"), "shape": ("shape", "colour", "size")}


def sample_list(rng: random.Random) -> list[Thing]:
    """From two kinds of shapes to all, in any order; no two kinds share a colour."""
    count = rng.randint(2, MOST)
    kinds = [
        Thing(rng.choice(list(RADII)), colour, shape, 0, 0, 0)
        for colour, shape in zip(rng.sample(list(PALETTE), count), rng.sample(SHAPES, count), strict=True)
    ]
    things = [thing for thing in kinds for _ in range(rng.choice(REPEATED))]
    rng.shuffle(things)
    return things


def sample_questions(rng: random.Random, things: Sequence[Thing], count: int) -> list[Question]:
    """Up to ``count`` questions, none twice: each of :data:`KINDS` is as likely, and so is each of its answers."""
    left = {
        question for question in questions(Scene("list", "white", tuple(things), True, False)) if question.kind in KINDS
    }
    chosen: list[Question] = []
    while left and len(chosen) < count:
        kind = rng.choice(sorted({question.kind for question in left}))
        answer = rng.choice(sorted({question.answer for question in left if question.kind == kind}))
        chosen.append(rng.choice(sorted(question for question in left if question[::2] == (kind, answer))))
        left.remove(chosen[-1])
    return chosen


def exchanges(rng: random.Random, asked: int) -> Iterator[tuple[str, str]]:
    """What the user says and the reply, in turn; the first begins with the list."""
    things = sample_list(rng)
    listed = in_words(things) + ". "
    for key in rng.sample(sorted(ORDERS), len(ORDERS)):
        words = ORDERS[key]
        yield f"{listed}sort by {key}.", in_words(sorted(things, key=lambda thing: getattr(thing, words[0])), words)
        listed = ""
    for question in sample_questions(rng, things, asked):
        yield question[1:]


def rows(split: str, count: int, seed: int, asked: int) -> Iterator[dict[str, Any]]:
    """Yield the rows of a split. Row i has its own random stream, made from seed, split and i."""
    for i in tqdm(range(count), desc=f"write {split}"):
        said = exchanges(random.Random(f"{seed}/lists/{split}/{i}"), asked)
        messages = [turn(role, text) for each in said for role, text in zip(("user", "assistant"), each, strict=True)]
        yield {"images": [], "messages": messages, "kind": "list"}


def build(train: int, validation: int, seed: int, asked: int) -> datasets.DatasetDict:
    """Make the splits that have rows. Raises ValueError if a number is negative."""
    for field, value in (("train", train), ("validation", validation), ("questions", asked)):
        if value < 0:
            raise ValueError(f"{field} is {value}, which is too small: use --{field} 0 or more")
    text = datasets.Value("string")
    content = datasets.List({"type": text, "text": text})
    features = datasets.Features(
        images=datasets.List(datasets.Image()), messages=datasets.List({"role": text, "content": content}), kind=text
    )
    return make_splits(
        {"train": train, "validation": validation}, lambda split, count: rows(split, count, seed, asked), features
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line and write the folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--train", type=int, default=24000, help="conversations to train on (default: %(default)s)")
    parser.add_argument("--validation", type=int, default=0, help="conversations held out (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of all random streams (default: %(default)s)")
    parser.add_argument(
        "--questions", type=int, default=4, dest="asked", help="of a row, behind its orders (default: %(default)s)"
    )
    args = parser.parse_args(argv)
    splits = build(args.train, args.validation, args.seed, args.asked)
    splits.save_to_disk(args.out)
    for split, part in splits.items():
        print(f"{args.out}: {len(part)} {split} conversations")


if __name__ == "__main__":
    explain_errors(main)

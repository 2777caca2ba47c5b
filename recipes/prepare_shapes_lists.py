"""Prepare conversations in words alone about shapes that the user lists: say them in another order, and answer questions.

    python recipes/prepare_shapes_lists.py --out data/shapes_lists --train 32000 --validation 512

A model that learns them first looks things up in its own list of the shapes of an image (`configs/vqa_shapes_words.yaml`).
Questions alone do not teach it: an answer which is any of the listed ones is right so often that a small model stops there.
Saying the list in another order asks for a look with every word, and what it learns by it answers questions, too:

    user       large blue circle, small red star, small pink heart. list by color.
    assistant  blue circle large, pink heart small, red star small
    user       list by shape.
    assistant  circle blue large, heart pink small, star red small
    user       what color is the heart?
    assistant  pink

No two things of a list share their shape or color, so that every question has one answer. Rows hold `images` (none), `messages`
and `kind`, as those of `prepare_shapes_chat.py`; row i depends on the seed, the split and i alone. Made by code and free to
use (CC0-1.0).
"""

import argparse
import random
from collections.abc import Iterator, Sequence
from operator import attrgetter
from pathlib import Path
from typing import Any

import datasets
from tqdm import tqdm
from unified_recipes.prepare_shapes import PALETTE, RADII, SHAPES, Thing, make_splits
from unified_recipes.prepare_shapes_chat import as_turns, attribute_questions, in_words

from unified.errors import explain_errors

FEWEST, MOST = 2, min(len(SHAPES), len(PALETTE))  # shapes in a list
ORDERS = {"color": ("colour", "shape", "size"), "shape": ("shape", "colour", "size")}


def sample_list(rng: random.Random, most: int) -> list[Thing]:
    """From two shapes to ``most`` in any order, each of another shape and color."""
    count = rng.randint(FEWEST, most)
    sizes = [rng.choice(list(RADII)) for _ in range(count)]
    words = zip(sizes, rng.sample(list(PALETTE), count), rng.sample(SHAPES, count), strict=True)
    return [Thing(*each, 0, 0, 0) for each in words]  # without a place


def exchanges(rng: random.Random, most: int, asked: int) -> Iterator[tuple[str, str]]:
    """What the user says and the reply, in turn; the first begins with the list."""
    things = sample_list(rng, most)
    listed = in_words(things) + ". "
    for key in rng.sample(sorted(ORDERS), len(ORDERS)):
        yield f"{listed}list by {key}.", in_words(sorted(things, key=attrgetter(ORDERS[key][0])), ORDERS[key])
        listed = ""
    for _ in range(asked):
        yield rng.choice(attribute_questions(rng.choice(things)))[1:]


def rows(split: str, count: int, seed: int, most: int, asked: int) -> Iterator[dict[str, Any]]:
    """Yield the rows of a split. Row i has its own random stream, made from seed, split and i."""
    for i in tqdm(range(count), desc=f"write {split}"):
        said = [*exchanges(random.Random(f"{seed}/lists/{split}/{i}"), most, asked)]
        yield {"images": [], "messages": as_turns(said), "kind": "list"}


def build(train: int, validation: int, seed: int, most: int = 4, asked: int = 4) -> datasets.DatasetDict:
    """Make the splits that have rows. Raises ValueError if a number is out of range."""
    for field, value in (("train", train), ("validation", validation), ("questions", asked)):
        if value < 0:
            raise ValueError(f"{field} is {value}, which is too small: use --{field} 0 or more")
    if not FEWEST <= most <= MOST:
        raise ValueError(f"most is {most}, which is out of range: use --most {FEWEST} to {MOST}, the shapes there are")
    text = datasets.Value("string")
    content = datasets.List({"type": text, "text": text})
    features = datasets.Features(
        images=datasets.List(datasets.Image()), messages=datasets.List({"role": text, "content": content}), kind=text
    )
    return make_splits(
        {"train": train, "validation": validation}, lambda split, count: rows(split, count, seed, most, asked), features
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line and write the folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--train", type=int, default=32000, help="conversations to train on (default: %(default)s)")
    parser.add_argument("--validation", type=int, default=512, help="conversations held out (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of all random streams (default: %(default)s)")
    parser.add_argument("--most", type=int, default=4, help="shapes in a list at most (default: %(default)s)")
    parser.add_argument(
        "--questions", type=int, default=4, dest="asked", help="of a row, behind its two orders (default: %(default)s)"
    )
    args = parser.parse_args(argv)
    splits = build(args.train, args.validation, args.seed, args.most, args.asked)
    splits.save_to_disk(args.out)
    for split, part in splits.items():
        print(f"{args.out}: {len(part)} {split} conversations")


if __name__ == "__main__":
    explain_errors(main)

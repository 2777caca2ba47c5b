"""Encode ImageNet as LlamaGen does: ten crops of every training image, with its class, once.

    python recipes/prepare_imagenet.py --source IMAGENET --image-tokenizer vq_ds16_c2i.pt --out data/imagenet-codes
    python recipes/prepare_imagenet.py --source ILSVRC/imagenet-1k --streaming --image-tokenizer DIR --out data/imagenet-codes

IMAGENET is a local folder with ``train/n01440764/*.JPEG`` and, if held-out images shall be encoded, ``val/n01440764/*.JPEG``,
or the name of a data set on the Hub with a column of classes. ``LOC_synset_mapping.txt`` in the folder, or ``--class-names``,
says what the classes are called.

``OUT/train`` gets ten crops of every image: its centre at 1.1 times the size, of which the corners and the middle, each also
mirrored. ``data.one_view=true`` trains on one of them at random in every epoch. ``OUT/validation`` gets the centre. Run the
same command again after a kill and it goes on; several processes share the work under ``accelerate launch``.
"""

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path

from accelerate import PartialState

from unified.data.class_names import read_synsets
from unified.data.code_cache import CACHE_FILE, is_codes_cache, open_tokenizer
from unified.data.crops import Views
from unified.data.labelled import digest_of, encode_labelled
from unified.data.rows import column_names
from unified.data.sources import load_source
from unified.errors import explain_errors
from unified.hub import expanded
from unified.settings import refuse_other
from unified_tokenizers import ImageTokenizer

MAPPING = "LOC_synset_mapping.txt"


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", required=True, help="folder of ImageNet, or name of a data set on the Hub")
    parser.add_argument("--image-tokenizer", required=True, help="folder, published weights or Hub name")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--image-size", type=int, default=256, help="side in pixels (default: %(default)s)")
    parser.add_argument("--splits", nargs="+", default=["train", "validation"], choices=["train", "validation"])
    parser.add_argument(
        "--zoom", type=float, default=1.1, help="ten crops of so many times the size (default: %(default)s)"
    )
    parser.add_argument("--image-column", default="image", help="default: %(default)s")
    parser.add_argument("--class-column", default="label", help="default: %(default)s")
    parser.add_argument(
        "--class-names", type=Path, help=f"file such as {MAPPING} (default: that of the source, if any)"
    )
    parser.add_argument("--batch-size", type=int, default=64, help="images per encoder call")
    parser.add_argument("--block-rows", type=int, default=1024, help="images between two writes")
    parser.add_argument("--max-rows", type=int, help="encode only the first images of every split")
    parser.add_argument("--streaming", action="store_true", help="read rows as they come")
    return parser.parse_args(argv)


def is_there(
    args: argparse.Namespace, split: str, tokenizer: ImageTokenizer, views: Views, names: dict[str, str] | None
) -> bool:
    """Whether a split is encoded. Raises ValueError if it was with other settings."""
    out = args.out / split
    if not is_codes_cache(out):
        return False
    wanted = {
        "tokenizer_fingerprint": tokenizer.fingerprint, "source": args.source, "views": views.described(),
        "columns": [args.image_column, args.class_column], "max_rows": args.max_rows,
        "names": digest_of(names),
    }  # fmt: skip
    refuse_other("out", out, json.loads((out / CACHE_FILE).read_text()), wanted)
    print(f"{out}: encoded already")
    return True


def check_classes(args: argparse.Namespace, split: str) -> None:
    """Raises ValueError if the images of a split have no classes, as those of ImageNet's flat ``val`` folder."""
    rows = load_source(args.source, split, args.streaming, image_column=args.image_column)
    if args.class_column not in column_names(rows):
        raise ValueError(
            f"class_column: the {split} images of {args.source!r} have no {args.class_column!r}; put them into a folder for each "
            "class, name another column, or leave the split out with --splits."
        )


def prepare(args: argparse.Namespace, tokenizer: ImageTokenizer, process: PartialState) -> None:
    """Encode every split that is not there yet, and say what was skipped. Raises ValueError if one has no classes."""
    mapping = args.class_names or expanded(args.source) / MAPPING
    names = read_synsets(mapping) if args.class_names or mapping.is_file() else None
    size = ((args.image_size, args.image_size),)
    views = {"train": Views(size, "ten", zoom=args.zoom), "validation": Views(size)}
    missing = [split for split in args.splits if not is_there(args, split, tokenizer, views[split], names)]
    for split in missing:  # before days of encoding
        check_classes(args, split)
    for split in missing:
        start, out = time.monotonic(), args.out / split
        out.parent.mkdir(parents=True, exist_ok=True)
        report = encode_labelled(
            tokenizer, args.source, out, views[split], (split,), args.image_column, args.class_column, args.batch_size,
            args.streaming, args.block_rows, process, max_rows=args.max_rows, names=names,
        )[split]  # fmt: skip
        if process.is_main_process:
            print(f"{out}: {report.summary()}")
            print(f"{report.used} images in {time.monotonic() - start:.1f} s")


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line and encode."""
    args = parse_arguments(argv)
    tokenizer, process = open_tokenizer(args.image_tokenizer)
    prepare(args, tokenizer, process)


if __name__ == "__main__":
    explain_errors(main)

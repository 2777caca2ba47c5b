"""Encode the pictures of any captioned source once, so that training reads codes.

    python recipes/encode_images.py --image-tokenizer runs/tokenizer --source data/openmoji --out data/openmoji-codes

The cache carries the tokenizer's fingerprint: training refuses codes of another tokenizer.
"""

import argparse

from unified.codes import encode_source
from unified_tokenizers import AutoImageTokenizer


def main() -> None:
    """Parse the command line, encode, and say what was skipped."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image-tokenizer", required=True, help="folder or Hub name of the image tokenizer")
    parser.add_argument(
        "--source", required=True, help="data folder, parquet or metadata file, saved data set or Hub name"
    )
    parser.add_argument("--out", required=True, help="folder to write")
    parser.add_argument("--splits", nargs="+", default=["train", "validation"], help="splits to encode")
    parser.add_argument(
        "--image-size", type=int, default=64, help="side in pixels; pictures are resized and centre-cropped"
    )
    parser.add_argument("--image-column", default="image", help="column with the pictures")
    parser.add_argument("--caption-column", default="caption", help="column with the captions")
    parser.add_argument("--batch-size", type=int, default=64, help="pictures per encoder call")
    parser.add_argument("--streaming", action="store_true", help="read rows as they come")
    args = parser.parse_args()
    reports = encode_source(
        AutoImageTokenizer.from_pretrained(args.image_tokenizer), args.source, args.out, tuple(args.splits),
        args.image_size, args.image_column, args.caption_column, args.batch_size, args.streaming,
    )  # fmt: skip
    for split, report in reports.items():
        print(f"{args.out} ({split}): {report.summary()}")


if __name__ == "__main__":
    main()

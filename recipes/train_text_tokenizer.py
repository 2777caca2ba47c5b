"""Train a sentencepiece text tokenizer on the captions of any source.

python recipes/train_text_tokenizer.py --source data/openmoji --out runs/text_tokenizer --vocab-size 1024
"""

import argparse
from collections.abc import Sequence

from unified.data import SkipReport, load_source
from unified.data.rows import captions
from unified.errors import explain_errors
from unified_tokenizers import train_sentencepiece


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", required=True, nargs="+", help="captioned sources")
    parser.add_argument("--split", default="train", help="split to read")
    parser.add_argument("--caption-column", default="caption", help="column with the captions")
    parser.add_argument("--vocab-size", type=int, default=1024, help="upper bound of the vocabulary")
    parser.add_argument("--out", required=True, help="folder to write")
    args = parser.parse_args(argv)
    texts: list[str] = []
    for source in args.source:
        report = SkipReport()
        texts += captions(load_source(source, args.split), report, args.caption_column)
        print(f"{source} ({args.split}): {report.summary()}")
    tokenizer = train_sentencepiece(texts, args.out, args.vocab_size)
    print(f"{args.out}: {tokenizer.vocab_size} pieces from {len(texts)} captions")


if __name__ == "__main__":
    explain_errors(main)

"""Train a sentencepiece text tokenizer on the captions, or the conversations, of any source.

python recipes/train_text_tokenizer.py --source data/openmoji --out runs/text_tokenizer --vocab-size 1024
python recipes/train_text_tokenizer.py --source data/shapes_chat --messages-column messages --out runs/text_tokenizer
"""

import argparse
from collections.abc import Sequence

from unified.data import SkipReport, load_source
from unified.data.chat import chat_texts
from unified.data.rows import captions
from unified.errors import explain_errors
from unified_tokenizers import train_sentencepiece
from unified_tokenizers.text import MODEL_TYPES


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", required=True, nargs="+", help="captioned sources")
    parser.add_argument("--split", default="train", help="split to read")
    parser.add_argument("--caption-column", default="caption", help="column with the captions")
    parser.add_argument(
        "--messages-column", help="column with conversations, lists of {role, content}, in place of captions"
    )
    parser.add_argument("--vocab-size", type=int, default=1024, help="upper bound of the vocabulary")
    parser.add_argument(
        "--model-type", choices=MODEL_TYPES, default=MODEL_TYPES[0],
        help="unigram splits the words of a small vocabulary (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--out", required=True, help="folder to write")
    args = parser.parse_args(argv)
    texts: list[str] = []
    for source in args.source:
        report = SkipReport()
        rows = load_source(source, args.split)
        if args.messages_column:
            texts += chat_texts(rows, report, ("images", args.messages_column))
        else:
            texts += captions(rows, report, args.caption_column)
        print(f"{source} ({args.split}): {report.summary()}")
    tokenizer = train_sentencepiece(texts, args.out, args.vocab_size, args.model_type)
    print(f"{args.out}: {tokenizer.vocab_size} pieces from {len(texts)} texts")


if __name__ == "__main__":
    explain_errors(main)

"""Encode the images of any captioned, labelled, interleaved or chat source once, so that training reads codes.

    python recipes/encode_images.py --image-tokenizer runs/tokenizer --source data/openmoji --out data/openmoji-codes
    python recipes/encode_images.py --image-tokenizer runs/tokenizer --source folders --class-column label --out data/codes
    python recipes/encode_images.py --image-tokenizer runs/tokenizer --source articles.parquet --segments-column segments \\
        --buckets 64x64 64x96 96x64 --out data/article-codes
    python recipes/encode_images.py --image-tokenizer runs/tokenizer --source chat.parquet --messages-column messages --out codes
    ... --vision-encoder google/siglip-base-patch16-256 for a model that reads images by the features of a vision encoder

The cache carries the tokenizer's fingerprint: training refuses codes of another tokenizer. It also carries a digest of the
captions and of the image files' names, sizes and times, by which a run notices that they have changed. Run the same command
again after a kill and it goes on. Several processes share the work under ``accelerate launch recipes/encode_images.py ...``.
"""

import argparse
import time
from collections.abc import Sequence

from unified.data.chat import encode_chat
from unified.data.code_cache import encode_source, open_tokenizer
from unified.data.crops import CROPS, Views
from unified.data.interleaved import encode_interleaved
from unified.data.labelled import encode_labelled
from unified.errors import explain_errors
from unified.model.vision import VisionEncoder
from unified.registry import add_import_argument, import_extensions


def size(text: str) -> tuple[int, int]:
    """Read ``HEIGHTxWIDTH``."""
    height, cross, width = text.partition("x")
    if not (cross and height.isdigit() and width.isdigit()):
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form HEIGHTxWIDTH, such as 64x96")
    return int(height), int(width)


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    argv = import_extensions(argv)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_import_argument(parser)
    parser.add_argument(
        "--image-tokenizer", required=True, help="folder, published weights or Hub name of the image tokenizer"
    )
    parser.add_argument(
        "--source", required=True, help="data folder, file or address (parquet, tar, ...), saved data set or Hub name"
    )
    parser.add_argument("--out", required=True, help="folder to write")
    parser.add_argument("--splits", nargs="+", default=["train", "validation"], help="splits to encode")
    parser.add_argument(
        "--validation", type=float, metavar="SHARE",
        help="hold out this share of the split train, chosen by the images' content, as the split validation",
    )  # fmt: skip
    parser.add_argument("--image-column", default="image", help="column with the images")
    parser.add_argument("--caption-column", default="caption", help="column with the captions")
    parser.add_argument(
        "--class-column",
        help="column with classes, for class-conditional models: encode these in place of captions; of a folder of images with "
        "a folder for each class, label",
    )
    parser.add_argument("--caption", help="caption of all images, for a source that has none")
    parser.add_argument(
        "--segments-column",
        help="column with lists of {text, image}: encode interleaved rows in place of captioned ones",
    )
    parser.add_argument(
        "--messages-column",
        help="column with lists of {role, content}: encode conversations in place of captioned rows",
    )
    parser.add_argument("--images-column", default="images", help="column with the lists of their images")
    parser.add_argument(
        "--vision-encoder",
        help="also keep the features of this vision model, for a model that reads by them (model.options.vision)",
    )
    parser.add_argument("--vision-layer", type=int, default=-2, help="its hidden states that are kept")
    parser.add_argument("--vision-pool", type=int, default=1, help="mean over windows of so many features a side")
    parser.add_argument("--batch-size", type=int, default=64, help="images per encoder call")
    parser.add_argument(
        "--block-rows", type=int, default=1024, help="rows between two writes; a run that is killed loses at most these"
    )
    parser.add_argument("--max-rows", type=int, help="encode only the first rows of every split")
    parser.add_argument("--streaming", action="store_true", help="read rows as they come")
    view = parser.add_argument_group("views")
    view.add_argument(
        "--image-size", type=int, default=64, help="side in pixels; images are resized and centre-cropped"
    )
    view.add_argument("--buckets", type=size, nargs="+", metavar="HxW", help="sizes to choose from by aspect ratio")
    view.add_argument("--crop", choices=CROPS, default="center", help="which part of an image is encoded")
    view.add_argument("--crops", type=int, default=1, help="random crops per image")
    view.add_argument("--zoom", type=float, default=1.1, help="random and ten: resize to so much above the size")
    view.add_argument("--flips", action="store_true", help="also encode every view mirrored")
    view.add_argument("--seed", type=int, default=0, help="seed of the random crops")
    args = parser.parse_args(argv)
    names = ("image_column", "caption_column", "caption", "crop", "crops", "zoom", "flips", "seed")
    given = [f"--{name.replace('_', '-')}" for name in names if getattr(args, name) != parser.get_default(name)]
    if args.segments_column and given:
        parser.error(f"{', '.join(given)}: not for interleaved rows; leave out --segments-column")
    if args.messages_column and (given or args.segments_column or args.class_column or args.buckets):
        wrong = [*given, *(["--buckets"] if args.buckets else []), *(["--segments-column"] if args.segments_column else []),
                 *(["--class-column"] if args.class_column else [])]  # fmt: skip
        parser.error(f"{', '.join(wrong)}: not for conversations; leave out --messages-column")
    if args.vision_encoder and (args.segments_column or args.class_column):
        parser.error("--vision-encoder: images of interleaved rows and of classes are not read; leave it out")
    if args.class_column and (args.segments_column or args.caption or args.caption_column != "caption"):
        parser.error("--class-column: images have classes, captions or segments; leave the others out")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line, encode, and say what was skipped."""
    args = parse_arguments(argv)
    tokenizer, process = open_tokenizer(args.image_tokenizer)
    vision = None
    if args.vision_encoder:
        vision = VisionEncoder(args.vision_encoder, args.vision_layer, args.vision_pool, "--vision-encoder").to(
            process.device
        )
    sizes = tuple(args.buckets or [(args.image_size, args.image_size)])
    start = time.monotonic()
    if args.segments_column:
        reports = encode_interleaved(
            tokenizer, args.source, args.out, tuple(args.splits), sizes, args.segments_column, args.batch_size,
            args.streaming, args.block_rows, process, max_rows=args.max_rows,
            validation=args.validation,
        )  # fmt: skip
    elif args.messages_column:
        reports = encode_chat(
            tokenizer, args.source, args.out, tuple(args.splits), sizes[0], (args.images_column, args.messages_column),
            args.batch_size, args.streaming, args.block_rows, process, max_rows=args.max_rows,
            validation=args.validation, vision=vision,
        )  # fmt: skip
    elif args.class_column:
        views = Views(sizes, args.crop, args.crops, args.zoom, args.flips, args.seed)
        reports = encode_labelled(
            tokenizer, args.source, args.out, views, tuple(args.splits), args.image_column, args.class_column,
            args.batch_size, args.streaming, args.block_rows, process, max_rows=args.max_rows,
            validation=args.validation,
        )  # fmt: skip
    else:
        reports = encode_source(
            tokenizer, args.source, args.out, tuple(args.splits), args.image_size, args.image_column, args.caption_column,
            args.batch_size, args.streaming, Views(sizes, args.crop, args.crops, args.zoom, args.flips, args.seed),
            args.block_rows, process, args.caption, max_rows=args.max_rows,
            validation=args.validation, vision=vision,
        )  # fmt: skip
    if process.is_main_process:
        for split, report in reports.items():
            print(f"{args.out} ({split}): {report.summary()}")
        used = sum(report.used for report in reports.values())
        print(f"{used} rows in {time.monotonic() - start:.1f} s")


if __name__ == "__main__":
    explain_errors(main)

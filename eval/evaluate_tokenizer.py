"""Measure image tokenizers on the same held-out images, and put them side by side.

    python eval/evaluate_tokenizer.py --tokenizers runs/quickstart/image_tokenizer vq_ds16_c2i.pt --data data/openmoji \\
        --split validation --image-size 64 --out runs/tokenizers

The folder gets `metrics.json` (metrics with the recipe of each), `table.md` and `reconstructions.png`. The images stream
by: one batch is in memory at a time, and all tokenizers see it.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from unified.data import SkipReport
from unified.data.crops import fit
from unified.errors import explain_errors
from unified.files import write_json, write_text
from unified.registry import add_import_argument, import_extensions
from unified_eval.command_line import add_column_arguments, check_counts, check_folder, device
from unified_eval.extraction import batches
from unified_eval.features import EXTRACTORS, Extractor, load_extractor
from unified_eval.files import write_image
from unified_eval.frechet import frechet_distance
from unified_eval.reconstruction import squared_error, summarise_errors
from unified_eval.selection import choose_evenly, first_usable_rows, usable_images
from unified_eval.sheets import captioned_grid
from unified_eval.structural import code_statistics, ssim
from unified_tokenizers import AutoImageTokenizer, ImageTokenizer
from unified_tokenizers.images import to_pil, to_tensor
from unified_tokenizers.vq_loss import LPIPS


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    argv = import_extensions(argv)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_import_argument(parser)
    parser.add_argument("--tokenizers", nargs="+", required=True, help="folders, published weights or Hub names")
    parser.add_argument("--names", nargs="+", help="names for the table (default: their last path part)")
    parser.add_argument("--data", required=True, help="data folder, file or Hub name with captioned images")
    parser.add_argument("--split", default="validation", help="split to measure on (default: %(default)s)")
    add_column_arguments(parser)
    parser.add_argument("--image-size", type=int, required=True, help="side in pixels; must divide by every stride")
    parser.add_argument("--max-samples", type=int, help="use the first this many usable rows (default: all)")
    parser.add_argument("--extractor", choices=EXTRACTORS, default=EXTRACTORS[0], help="features of rFID and its kin")
    parser.add_argument("--inception-weights", type=Path, help="weights file of the inception extractor")
    parser.add_argument(
        "--lpips", nargs=2, metavar=("VGG16", "LINEAR"), help="weights files; LPIPS is left out without them"
    )
    parser.add_argument("--sheet", type=int, default=8, help="images on the sheet (default: %(default)s)")
    parser.add_argument(
        "--batch-size", type=int, default=32, help="images per forward pass; also affects speeds (default: %(default)s)"
    )
    parser.add_argument("--device", type=device, default="cpu", help="device of the tokenizers (default: %(default)s)")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    args = parser.parse_args(argv)
    if args.names is None:
        args.names = [Path(name).stem if Path(name).is_file() else Path(name).name for name in args.tokenizers]
    return args


def check_arguments(args: argparse.Namespace) -> None:
    """Raise ValueError for mistakes that the arguments alone show."""
    if len(args.names) != len(args.tokenizers) or len(set(args.names)) != len(args.names):
        raise ValueError(f"--names: need {len(args.tokenizers)} different ones, got {args.names}.")
    check_counts(args, "image_size", "batch_size")
    if args.sheet < 0:
        raise ValueError(f"--sheet: {args.sheet} is below 0; 0 leaves the sheet out.")
    check_folder("out", args.out)


class Measurement:
    """Running sums of one tokenizer over the batches of a stream of images."""

    def __init__(self, tokenizer: ImageTokenizer, lpips: LPIPS | None, device: str) -> None:
        self.tokenizer, self.lpips, self.device = tokenizer, lpips, device
        self.errors: list[Tensor] = []
        self.features: list[np.ndarray] = []
        self.similarity = self.perceptual = 0.0
        self.code_counts = torch.zeros(tokenizer.codebook_size, dtype=torch.long)
        self.seconds: list[tuple[int, float, float]] = []  # images, encoding, decoding

    @torch.inference_mode()
    def add(self, images: list[Image.Image], extractor: Extractor) -> list[Image.Image]:
        """Measure a batch; returns its reconstructions."""
        pixels = to_tensor(images)
        on_device = pixels.to(self.device)
        if not self.seconds:
            self.tokenizer.decode(self.tokenizer.encode(on_device))  # the first call also pays for allocations
        codes, encoding = self.timed(lambda: self.tokenizer.encode(on_device))
        made, decoding = self.timed(lambda: self.tokenizer.decode(codes))
        self.seconds.append((len(images), encoding, decoding))
        self.code_counts += torch.bincount(codes.cpu().flatten(), minlength=len(self.code_counts))
        rebuilt = to_pil(made)
        again = to_tensor(rebuilt)
        pair = [(part / 2 + 0.5).clamp(0, 1) for part in (pixels, again)]
        self.errors.append(squared_error(*pair))
        self.similarity += float(ssim(*pair).sum())
        if self.lpips is not None:
            self.perceptual += float(self.lpips.distances(pixels, again).sum())
        self.features.append(extractor(rebuilt, len(rebuilt)))
        return rebuilt

    def timed(self, call: Callable[[], Tensor]) -> tuple[Tensor, float]:
        """Result and seconds of a call."""
        start = time.perf_counter()
        result = call()
        if self.device.startswith("cuda"):
            torch.cuda.synchronize()
        return result, time.perf_counter() - start

    def metrics(self, key: str, real_features: np.ndarray) -> dict[str, float]:
        """All metrics; the distance of reconstructions to originals is called ``key``."""
        errors = torch.cat(self.errors)
        quality, count, whole = summarise_errors(errors), len(errors), self.seconds[0][0]
        found = {
            "psnr_db": quality["mean_db"],
            "psnr_pooled_db": quality["pooled_db"],
            "ssim": self.similarity / count,
            key: frechet_distance(np.concatenate(self.features), real_features),
            **({} if self.lpips is None else {"lpips": self.perceptual / count}),
            **code_statistics(self.code_counts, self.tokenizer.downsample),
        }
        for number, way in ((1, "encode"), (2, "decode")):
            times = [record[number] / record[0] for record in self.seconds if record[0] == whole]
            found[f"{way}_images_per_second"] = 1 / statistics.median(times)
        return found


def square_images(args: argparse.Namespace, report: SkipReport) -> Iterator[tuple[int, str, Image.Image]]:
    """Number, caption and square image of every usable row."""
    rows = usable_images(args.data, args.split, args.max_samples, args.image_column, args.caption_column, report)
    return ((row.row, row.caption, fit(row.image, args.image_size)) for row in rows)


def table(results: dict[str, dict[str, Any]]) -> str:
    """Metrics by row, tokenizers by column, as Markdown."""
    names = list(results)
    lines = [f"| | {' | '.join(names)} |", "|---|" + "---:|" * len(names)]
    for key in ("codebook_size", "stride"):
        lines.append(f"| {key} | {' | '.join(str(results[name][key]) for name in names)} |")
    for metric in next(iter(results.values()))["metrics"]:
        values = [format(results[name]["metrics"][metric], ".4g") for name in names]
        lines.append(f"| {metric} | {' | '.join(values)} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure every tokenizer on the same images; write and print."""
    # 1. Read the command line, list the rows, load the networks.
    args = parse_arguments(argv)
    check_arguments(args)
    rows, _ = first_usable_rows(args.data, args.split, args.max_samples, args.image_column, args.caption_column)
    on_sheet = {row.row for row in choose_evenly(rows, min(args.sheet, len(rows)), 0)} if args.sheet > 0 else set()
    lpips = LPIPS(*args.lpips) if args.lpips else None
    extractor = load_extractor(args.extractor, args.inception_weights)
    measured: dict[str, Measurement] = {}
    for name, path in zip(args.names, args.tokenizers, strict=True):
        tokenizer = AutoImageTokenizer.from_pretrained(path)
        if args.image_size % tokenizer.downsample:
            raise ValueError(
                f"image_size: {args.image_size} does not divide by the stride {tokenizer.downsample} of {name!r}; "
                "use a common multiple."
            )
        if isinstance(tokenizer, nn.Module):
            tokenizer.to(args.device).eval()
        measured[name] = Measurement(tokenizer, lpips, args.device)

    # 2. Measure batch by batch, and keep the images of the sheet alone.
    report = SkipReport()
    real_features: list[np.ndarray] = []
    sheet: list[list[Image.Image]] = []
    captions: list[str] = []
    bar = tqdm(total=len(rows), desc="measure", unit="image")
    for batch in batches(square_images(args, report), args.batch_size):
        images = [image for _, _, image in batch]
        real_features.append(extractor(images, len(images)))
        rebuilt = [measurement.add(images, extractor) for measurement in measured.values()]
        for (number, caption, image), *columns in zip(batch, *rebuilt, strict=True):
            if number in on_sheet:
                sheet.append([image, *columns])
                captions.append(caption)
        bar.update(len(batch))
    bar.close()
    print(f"{args.data} [{args.split}]: {report.summary()}")

    # 3. Summarise and write.
    key = f"r{extractor.key}"
    results: dict[str, dict[str, Any]] = {
        name: {
            "fingerprint": measurement.tokenizer.fingerprint,
            "codebook_size": measurement.tokenizer.codebook_size,
            "stride": measurement.tokenizer.downsample,
            "metrics": measurement.metrics(key, np.concatenate(real_features)),
        }
        for name, measurement in measured.items()
    }
    per_batch, threads = min(args.batch_size, report.used), torch.get_num_threads()
    recipe = {
        "data": args.data, "split": args.split, "n": report.used, "image_size": args.image_size,
        "psnr": "mean over images rounded to 8 bits, peak 255",
        "ssim": "Gaussian 11x11, sigma 1.5, RGB channels, data range 1, whole windows only",
        key: {"distance": f"Frechet, {extractor.metric}, reconstructions to originals", **extractor.recipe()},
        "lpips": None if args.lpips is None else {"network": "VGG16, LPIPS 0.1", "files": args.lpips},
        "speed": f"median over batches of {per_batch} on {args.device}, {threads} threads",
        "codes": "over all images of the split; a small set cannot use a large codebook",
    }  # fmt: skip
    write_json(args.out / "metrics.json", {"recipe": recipe, "tokenizers": results})
    write_text(args.out / "table.md", table(results) + "\n")
    if sheet:
        titles = ["original", *(f"{name}\n{part['metrics']['psnr_db']:.2f} dB" for name, part in results.items())]
        write_image(args.out / "reconstructions.png", captioned_grid(sheet, column_titles=titles, row_titles=captions))
    print(f"\n{table(results)}\n\n{args.out / 'metrics.json'}")


if __name__ == "__main__":
    explain_errors(main)

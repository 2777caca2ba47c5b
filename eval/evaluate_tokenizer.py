"""Measure image tokenizers on the same held-out images, and put them side by side.

    python eval/evaluate_tokenizer.py --tokenizers runs/quickstart/image_tokenizer vq_ds16_c2i.pt --data data/openmoji \\
        --split validation --image-size 64 --out runs/tokenizers

The folder gets `metrics.json` (metrics with the recipe of each), `table.md` and `reconstructions.png`.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from unified.data.sources import fit_square
from unified_eval.features import EXTRACTORS, Extractor, load_extractor
from unified_eval.frechet import frechet_distance
from unified_eval.reconstruction import psnr_summary
from unified_eval.selection import choose_evenly, first_usable_rows
from unified_eval.sheets import captioned_grid
from unified_eval.structural import code_statistics, ssim
from unified_tokenizers import AutoImageTokenizer, ImageTokenizer
from unified_tokenizers.images import to_pil, to_tensor
from unified_tokenizers.vq_loss import LPIPS

Distance = Callable[[Tensor, Tensor], Tensor]


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizers", nargs="+", required=True, help="folders, published weights or Hub names")
    parser.add_argument("--names", nargs="+", help="what to call them (default: their last path part)")
    parser.add_argument("--data", required=True, help="data folder, file or Hub name with captioned images")
    parser.add_argument("--split", default="validation", help="split to measure on (default: %(default)s)")
    parser.add_argument("--image-column", default="image")
    parser.add_argument("--caption-column", default="caption")
    parser.add_argument("--image-size", type=int, required=True, help="side in pixels; must divide by every stride")
    parser.add_argument("--max-samples", type=int, help="use the first this many usable rows (default: all)")
    parser.add_argument("--extractor", choices=EXTRACTORS, default=EXTRACTORS[0], help="features of rFID and its kin")
    parser.add_argument("--inception-weights", type=Path, help="weights file of the inception extractor")
    parser.add_argument(
        "--lpips", nargs=2, metavar=("VGG16", "LINEAR"), help="weights files; LPIPS is left out without them"
    )
    parser.add_argument("--sheet", type=int, default=8, help="pictures on the sheet (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=32, help="pictures per forward pass; decides the speeds, too")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    args = parser.parse_args()
    if args.names is None:
        args.names = [Path(name).stem if Path(name).is_file() else Path(name).name for name in args.tokenizers]
    if len(args.names) != len(args.tokenizers) or len(set(args.names)) != len(args.names):
        parser.error(f"--names: need {len(args.tokenizers)} different ones, got {args.names}")
    return args


def timed(call: Callable[[], Tensor], device: str) -> tuple[Tensor, float]:
    """Result and seconds of a call."""
    start = time.perf_counter()
    result = call()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return result, time.perf_counter() - start


@torch.inference_mode()
def reconstruct_timed(
    tokenizer: ImageTokenizer, pictures: Sequence[Image.Image], batch_size: int, device: str, name: str
) -> tuple[list[Image.Image], Tensor, dict[str, float]]:
    """Decoded images, their codes on the CPU, and images per second either way (median over whole batches)."""
    decoded: list[Image.Image] = []
    codes, seconds = [], {"encode": [], "decode": []}  # type: ignore[var-annotated]
    warm = to_tensor(pictures[:batch_size]).to(device)
    tokenizer.decode(tokenizer.encode(warm))  # the first call also pays for allocations
    for start in tqdm(range(0, len(pictures), batch_size), desc=name, unit="batch"):
        batch = to_tensor(pictures[start : start + batch_size]).to(device)
        grid, encoding = timed(lambda batch=batch: tokenizer.encode(batch), device)  # type: ignore[misc]
        made, decoding = timed(lambda grid=grid: tokenizer.decode(grid), device)  # type: ignore[misc]
        codes.append(grid.cpu().flatten())
        decoded += to_pil(made)
        if len(batch) == min(batch_size, len(pictures)):
            seconds["encode"].append(encoding / len(batch))
            seconds["decode"].append(decoding / len(batch))
    speeds = {f"{way}_images_per_second": 1 / statistics.median(times) for way, times in seconds.items()}
    return decoded, torch.cat(codes), speeds


def pairwise_mean(
    distance: Distance, a: Sequence[Image.Image], b: Sequence[Image.Image], batch_size: int, low: float
) -> float:
    """Mean of ``distance`` over pairs of images scaled to [low, 1]."""
    total = 0.0
    for start in range(0, len(a), batch_size):
        x, y = (to_tensor(pictures[start : start + batch_size]) for pictures in (a, b))
        if low == 0:
            x, y = ((pixels / 2 + 0.5).clamp(0, 1) for pixels in (x, y))
        total += float(distance(x, y).sum())
    return total / len(a)


@torch.inference_mode()
def measure(
    tokenizer: ImageTokenizer,
    pictures: Sequence[Image.Image],
    extractor: Extractor,
    real_features: Any,
    lpips: LPIPS | None,
    batch_size: int,
    device: str,
    name: str,
) -> tuple[dict[str, float], list[Image.Image]]:
    """All metrics of one tokenizer, and its reconstructions."""
    decoded, codes, speeds = reconstruct_timed(tokenizer, pictures, batch_size, device, name)
    quality = psnr_summary(pictures, decoded)
    figures = {
        "psnr_db": quality["mean_db"],
        "psnr_pooled_db": quality["pooled_db"],
        "ssim": pairwise_mean(ssim, pictures, decoded, batch_size, 0),
        f"r{extractor.key}": frechet_distance(extractor(decoded, batch_size), real_features),
    }
    if lpips is not None:
        figures["lpips"] = pairwise_mean(lpips.distances, pictures, decoded, batch_size, -1)
    return figures | code_statistics(codes, tokenizer.codebook_size, tokenizer.downsample) | speeds, decoded


def table(results: dict[str, dict[str, Any]]) -> str:
    """Metrics by row, tokenizers by column, as Markdown."""
    names = list(results)
    rows = list(next(iter(results.values()))["figures"])
    lines = [f"| | {' | '.join(names)} |", "|---|" + "---:|" * len(names)]
    described = ("codebook_size", "stride")
    lines += [f"| {key} | {' | '.join(str(results[name][key]) for name in names)} |" for key in described]
    for row in rows:
        values = [format(results[name]["figures"][row], ".4g") for name in names]
        lines.append(f"| {row} | {' | '.join(values)} |")
    return "\n".join(lines)


def main() -> None:
    """Measure every tokenizer on the same images; write and print."""
    args = parse_arguments()
    rows, report = first_usable_rows(
        args.data, args.split, args.max_samples, image_column=args.image_column, caption_column=args.caption_column
    )
    print(f"{args.data} [{args.split}]: {report.summary()}")
    tokenizers = {
        name: AutoImageTokenizer.from_pretrained(path) for name, path in zip(args.names, args.tokenizers, strict=True)
    }
    for name, tokenizer in tokenizers.items():
        if args.image_size % tokenizer.downsample:
            raise ValueError(
                f"image_size: {args.image_size} does not divide by the stride {tokenizer.downsample} of {name!r}; use a common "
                "multiple."
            )
    pictures = [fit_square(row.image, args.image_size) for row in rows]
    extractor = load_extractor(args.extractor, args.inception_weights)
    lpips = LPIPS(*args.lpips) if args.lpips else None
    real_features = extractor(pictures, args.batch_size, progress=True)
    results: dict[str, dict[str, Any]] = {}
    decoded: dict[str, list[Image.Image]] = {}
    for name, tokenizer in tokenizers.items():
        if isinstance(tokenizer, nn.Module):
            tokenizer.to(args.device).eval()
        figures, decoded[name] = measure(
            tokenizer, pictures, extractor, real_features, lpips, args.batch_size, args.device, name
        )
        results[name] = {
            "fingerprint": tokenizer.fingerprint,
            "codebook_size": tokenizer.codebook_size,
            "stride": tokenizer.downsample,
            "figures": figures,
        }
    args.out.mkdir(parents=True, exist_ok=True)
    per_batch, threads = min(args.batch_size, len(pictures)), torch.get_num_threads()
    recipe = {
        "data": args.data, "split": args.split, "n": len(pictures), "image_size": args.image_size,
        "psnr": "mean over images rounded to 8 bits, peak 255",
        "ssim": "Gaussian 11x11, sigma 1.5, RGB channels, data range 1, whole windows only",
        f"r{extractor.key}": {"distance": f"Frechet, {extractor.metric}, reconstructions to originals", **extractor.recipe()},
        "lpips": None if args.lpips is None else {"network": "VGG16, LPIPS 0.1", "files": args.lpips},
        "speed": f"median over batches of {per_batch} on {args.device}, {threads} threads",
        "codes": "over all images of the split; a small set cannot use a large codebook",
    }  # fmt: skip
    text = json.dumps({"recipe": recipe, "tokenizers": results}, indent=2, allow_nan=False)
    (args.out / "metrics.json").write_text(text + "\n")
    (args.out / "table.md").write_text(table(results) + "\n")
    if args.sheet:
        chosen = choose_evenly(list(range(len(pictures))), min(args.sheet, len(pictures)), 0)
        sheet = [[pictures[i], *(decoded[name][i] for name in results)] for i in chosen]
        titles = [f"{name}\n{results[name]['figures']['psnr_db']:.2f} dB" for name in results]
        captioned_grid(
            sheet, column_titles=["original", *titles], row_titles=[rows[i].caption for i in chosen]
        ).save(args.out / "reconstructions.png")  # fmt: skip
    print(f"\n{table(results)}\n\n{args.out / 'metrics.json'}")


if __name__ == "__main__":
    main()

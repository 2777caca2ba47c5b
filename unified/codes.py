"""The codes cache: pictures encoded once, stored with the fingerprint of the tokenizer that made them."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import datasets
import torch
from tqdm import tqdm

from unified.data import CaptionedImage, SkipReport, captioned_images, fit_square, load_source
from unified_tokenizers.base import ImageTokenizer
from unified_tokenizers.images import to_tensor

CACHE_FILE = "codes.json"


def is_codes_cache(path: str | Path) -> bool:
    """Whether a folder was written by :func:`encode_source`."""
    return (Path(path) / CACHE_FILE).is_file()


def encode_source(
    tokenizer: ImageTokenizer,
    source: str,
    out: str | Path,
    splits: tuple[str, ...] = ("train", "validation"),
    image_size: int = 64,
    image_column: str = "image",
    caption_column: str = "caption",
    batch_size: int = 64,
    streaming: bool = False,
) -> dict[str, SkipReport]:
    """Encode the pictures of a source and write an Arrow data set of codes, grids and captions.

    Pictures are resized to ``image_size`` on the shorter side and cropped to a square. The folder appears only when it
    is complete. Rows that cannot be used are skipped and reported per split.

    Raises:
        ValueError: if the size does not divide by the tokenizer's stride, a split or column is missing, or no row is left.
    """
    if image_size % tokenizer.downsample:
        raise ValueError(f"image_size: {image_size} does not divide by the tokenizer's stride {tokenizer.downsample}.")
    out = Path(out)
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    reports, encoded = {}, {}
    for split in splits:
        report = SkipReport()
        rows = captioned_images(load_source(source, split, streaming), report, image_column, caption_column)
        # A generator keeps memory bounded by one batch; its working files live and die with the partial folder.
        encoded[split] = datasets.Dataset.from_generator(
            lambda rows=rows, split=split: _encoded_rows(tokenizer, rows, image_size, batch_size, split),
            cache_dir=str(partial / "work"),
            fingerprint=f"{split}-{tokenizer.fingerprint}",
        )
        if report.used == 0:
            raise ValueError(f"source: no usable row in split {split!r} of {source!r}; {report.summary()}")
        reports[split] = report
    datasets.DatasetDict(encoded).save_to_disk(partial)
    del encoded
    shutil.rmtree(partial / "work")
    description = {
        "tokenizer_fingerprint": tokenizer.fingerprint,
        "codebook_size": tokenizer.codebook_size,
        "downsample": tokenizer.downsample,
        "source": source,
        "image_size": image_size,
        "rows": {split: asdict(report) for split, report in reports.items()},
    }
    (partial / CACHE_FILE).write_text(json.dumps(description, indent=2))
    shutil.rmtree(out, ignore_errors=True)
    partial.rename(out)
    return reports


def _encoded_rows(
    tokenizer: ImageTokenizer, rows: Iterator[CaptionedImage], image_size: int, batch_size: int, split: str
) -> Iterator[dict[str, Any]]:
    with tqdm(desc=f"encode {split}", unit="image") as bar:
        batch: list[CaptionedImage] = []
        for row in rows:
            batch.append(row)
            if len(batch) == batch_size:
                yield from _encode_batch(tokenizer, batch, image_size)
                bar.update(len(batch))
                batch = []
        if batch:
            yield from _encode_batch(tokenizer, batch, image_size)
            bar.update(len(batch))


def _encode_batch(tokenizer: ImageTokenizer, batch: list[CaptionedImage], image_size: int) -> Iterator[dict[str, Any]]:
    codes = tokenizer.encode(to_tensor([fit_square(row.image, image_size) for row in batch])).cpu()
    for row, grid in zip(batch, codes, strict=True):
        text = {name: value for name, value in row.extra.items() if isinstance(value, str)}
        height, width = grid.shape
        yield {"codes": grid.flatten().to(torch.int32).numpy(), "height": height, "width": width,
               "caption": row.caption, "source_row": row.row, **text}  # fmt: skip


def load_codes(path: str | Path, split: str, fingerprint: str | None) -> datasets.Dataset:
    """Open one split of a codes cache.

    Args:
        path: folder written by :func:`encode_source`.
        split: split to open.
        fingerprint: fingerprint of the tokenizer in use; None skips the comparison.

    Raises:
        ValueError: if the folder is no cache, the split is missing, or the codes are of another tokenizer.
    """
    if not is_codes_cache(path):
        raise ValueError(f"codes: {str(path)!r} has no {CACHE_FILE}; write it with recipes/encode_images.py.")
    made_with = json.loads((Path(path) / CACHE_FILE).read_text())["tokenizer_fingerprint"]
    if fingerprint is not None and made_with != fingerprint:
        raise ValueError(
            f"codes: {str(path)!r} was made with tokenizer {made_with}, the one in use is {fingerprint}; encode the pictures again."
        )
    dataset = load_source(str(path), split)
    assert isinstance(dataset, datasets.Dataset)  # a saved data set that is not streamed
    return dataset.with_format("numpy")

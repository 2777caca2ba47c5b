"""From a run's data settings to its batches and to what is measured on held-out rows."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import datasets
import torch
from accelerate import Accelerator, PartialState
from torch import nn

from unified.config import UnifiedConfig, Vocabulary
from unified.data.batches import Batches, CaptionedBatches
from unified.data.code_cache import is_codes_cache, load_codes
from unified.data.interleaved import encode_interleaved, interleaved_sequence
from unified.data.mixture import MixedBatches, Source, image_source, text_source
from unified.data.sources import load_source
from unified.prediction.npp import Grid
from unified.training.config import DataConfig, SourceConfig, TrainConfig
from unified.training.inputs import check_lengths, code_grids
from unified.training.setup import as_cache, encode_once, open_codes
from unified.training.validation import caption_loss, image_loss, mean_loss
from unified_tokenizers import ImageTokenizer, TextTokenizer

Check = Callable[[nn.Module, torch.device], float]
_LOSSES = {"image": "image_loss", "text": "text_loss", "interleaved": "loss"}


@dataclass
class TrainingData:
    """What a run learns from.

    Attributes:
        batches: batches of this process.
        checks: losses to measure on the way, by name.
        rows: all rows that are read, by what they are for.
        grids: code grids of the images that are learned, each once.
        summary: a few words for the log.
    """

    batches: Batches
    checks: dict[str, Check]
    rows: dict[str, datasets.Dataset]
    grids: list[Grid]
    summary: str


def open_data(
    accelerator: Accelerator,
    config: TrainConfig,
    image_tokenizer: ImageTokenizer,
    text_tokenizer: TextTokenizer,
    model_config: UnifiedConfig,
) -> TrainingData:
    """Open ``data.train`` or ``data.sources``; images are encoded once, into ``<output_dir>/codes...``.

    Raises:
        ValueError: if a source, a split or a column is missing, a source is empty, codes are of another tokenizer, or a row
            is longer than the backbone can read.
    """
    if config.data.sources:
        return _mixture(accelerator, config, image_tokenizer, text_tokenizer, model_config)
    data, vocabulary = config.data, model_config.vocabulary
    rows, validation = open_codes(accelerator, config, image_tokenizer)
    opened = {"train": rows} if validation is None else {"train": rows, "validation": validation}
    for part in opened.values():
        check_lengths(part, text_tokenizer, model_config)
    batches = CaptionedBatches(
        rows, text_tokenizer, vocabulary, config.batch_size, config.steps * config.gradient_accumulation_steps, config.seed,
        data.caption_dropout, data.code_noise, data.train_on_captions, data.captioning,
        accelerator.process_index, accelerator.num_processes, data.pack, data.bucket,
    )  # fmt: skip
    checks: dict[str, Check] = {}
    if validation is not None:
        seen = rows.select(range(min(len(rows), len(validation))))
        held_out, known = (
            CaptionedBatches(r, text_tokenizer, vocabulary, config.batch_size, num_batches=0)
            for r in (validation, seen)
        )
        checks["validation_loss"] = lambda model, device: image_loss(model, held_out, device)
        checks["train_subset_loss"] = lambda model, device: image_loss(model, known, device)
        if data.captioning:
            checks["caption_loss"] = lambda model, device: caption_loss(model, held_out, device)
    return TrainingData(batches, checks, opened, code_grids(rows), f"{len(rows)} images")


def _mixture(
    accelerator: Accelerator,
    config: TrainConfig,
    image_tokenizer: ImageTokenizer,
    text_tokenizer: TextTokenizer,
    model_config: UnifiedConfig,
) -> TrainingData:
    vocabulary, limit = model_config.vocabulary, getattr(model_config.text_config, "max_position_embeddings", None)
    sources: list[Source] = []
    checks: dict[str, Check] = {}
    rows: dict[str, datasets.Dataset] = {}
    grids: set[Grid] = set()
    for number, source in enumerate(config.data.sources):
        if source.kind != "image" and limit is not None and source.max_length > limit:
            raise ValueError(
                f"data.sources: max_length {source.max_length} of {source.path!r} is beyond the {limit} positions of the "
                "backbone; lower it, or raise max_position_embeddings."
            )
        out = Path(config.output_dir) / f"codes-{number}"
        open_split = partial(_open, accelerator, config.data, source, image_tokenizer, text_tokenizer, vocabulary)
        sources.append(open_split(source.split, out, learned=True))
        rows[f"sources.{number}"] = sources[-1].rows
        if source.kind == "image":
            check_lengths(sources[-1].rows, text_tokenizer, model_config)
        grids.update(_grids(sources[-1].rows, source.kind))
        if config.validate_every and source.validation_split:
            held_out = open_split(source.validation_split, out.with_name(out.name + "-validation"), learned=False)
            rows[f"sources.{number}.validation"] = held_out.rows
            name = f"{source.kind}_validation_loss"
            if name in checks:
                name += f"_{number}"
            checks[name] = partial(_measure, held_out, vocabulary, config.batch_size, _LOSSES[source.kind])
    batches = MixedBatches(
        sources, vocabulary, config.batch_size, config.steps * config.gradient_accumulation_steps, config.seed,
        accelerator.process_index, accelerator.num_processes, config.data.pack,
    )  # fmt: skip
    shares = zip(sources, batches.shares, strict=True)
    summary = ", ".join(f"{n / 10:g} % {s.name} ({len(s.rows)} rows)" for s, n in shares)
    return TrainingData(batches, checks, rows, sorted(grids), summary)


def _grids(rows: datasets.Dataset, kind: str) -> list[Grid]:
    if kind == "image":
        return code_grids(rows)
    if kind == "text":
        return []
    sizes = rows.select_columns(["heights", "widths"])
    return [(h, w) for row in sizes for h, w in zip(row["heights"], row["widths"], strict=True)]


def _measure(
    source: Source, vocabulary: Vocabulary, rows: int, name: str, model: nn.Module, device: torch.device
) -> float:
    return mean_loss(model, source.once(vocabulary, rows), vocabulary, device, name)


def _open(
    accelerator: Accelerator,
    data: DataConfig,
    source: SourceConfig,
    image_tokenizer: ImageTokenizer,
    text_tokenizer: TextTokenizer,
    vocabulary: Vocabulary,
    split: str,
    out: Path,
    learned: bool,
) -> Source:
    """One split of a source; nothing is dropped, noised or turned around unless it is ``learned``."""
    name = f"{source.kind} {source.path!r}"
    if source.kind == "text":
        rows = _texts(data, source, split)
        return text_source(name, rows, source.weight, text_tokenizer, vocabulary, source.text_column, source.max_length)
    if source.kind == "interleaved":
        rows = _interleaved(accelerator, data, source, split, image_tokenizer, out)
        return Source(
            name,
            rows,
            source.weight,
            lambda row, rng: interleaved_sequence(row, text_tokenizer, vocabulary, source.max_length),
        )
    own = replace(data, image_column=source.image_column, caption_column=source.caption_column, caption=source.caption)
    if is_codes_cache(source.path):
        own = replace(own, crops=None, flips=False)
    path = as_cache(accelerator, own, source.path, split, image_tokenizer, out, learned)
    rows = load_codes(path, split, image_tokenizer.fingerprint)
    if not learned:
        return image_source(name, rows, source.weight, text_tokenizer, vocabulary)
    dropout = data.caption_dropout if source.caption_dropout is None else source.caption_dropout
    captioning = data.captioning if source.captioning is None else source.captioning
    return image_source(
        name,
        rows,
        source.weight,
        text_tokenizer,
        vocabulary,
        dropout,
        data.code_noise,
        data.train_on_captions,
        captioning,
    )


def _texts(data: DataConfig, source: SourceConfig, split: str) -> datasets.Dataset:
    """The rows of a split that have a text."""
    rows = load_source(source.path, split, storage_options=data.storage_options or None)
    assert isinstance(rows, datasets.Dataset)  # not streamed
    column = source.text_column
    if column not in rows.column_names:
        raise ValueError(
            f"data.sources: text_column {column!r} is not a column of {source.path!r}; it has {sorted(rows.column_names)}."
        )
    return rows.select_columns(column).filter(
        lambda text: isinstance(text, str) and bool(text.strip()), input_columns=column, keep_in_memory=True
    )


def _interleaved(
    accelerator: Accelerator,
    data: DataConfig,
    source: SourceConfig,
    split: str,
    tokenizer: ImageTokenizer,
    out: Path,
) -> datasets.Dataset:
    size = (data.image_size, data.image_size)
    path = Path(source.path)
    if not is_codes_cache(path):
        path = encode_once(
            accelerator,
            out,
            {"source": source.path, "sizes": [list(size)], "columns": [source.segments_column]},
            lambda: encode_interleaved(
                tokenizer,
                source.path,
                out,
                (split,),
                (size,),
                source.segments_column,
                streaming=data.streaming,
                process=PartialState(),
                storage_options=data.storage_options or None,
            ),
        )
    return load_codes(path, split, tokenizer.fingerprint, "interleaved").with_format(None)

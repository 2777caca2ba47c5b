"""From a run's data settings to its batches, and to the losses that are measured on held-out rows."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import datasets
import numpy as np
import torch
from torch import nn

from unified.data import load_source
from unified.data.batches import Batches, Source, in_order
from unified.data.code_cache import is_codes_cache
from unified.data.held_out import base_split, part_of
from unified.data.sources import check_splits
from unified.prediction.merge import Grid, Merge, patches
from unified.prediction.schedule import PatchSchedule
from unified.training.config import TrainConfig
from unified.training.data_config import DataConfig, SourceConfig
from unified.training.inputs import SPELT, bytes_per_token
from unified.training.sources import LOSSES, Context, grids_of, open_source
from unified.training.tensor_parallel import data_rank
from unified.training.validation import mean_loss

Check = Callable[[nn.Module, torch.device], float]


@dataclass
class TrainingData:
    """The data of a run.

    Attributes:
        batches: batches of this process.
        checks: losses to measure while training, by name.
        rows: all rows that are read, by their use.
        grids: code grids of the images in the loss, each once.
        summary: a few words for the log.
    """

    batches: Batches
    checks: dict[str, Check]
    rows: dict[str, datasets.Dataset]
    grids: list[Grid]
    summary: str


def open_data(context: Context) -> TrainingData:
    """Open all sources; images are encoded once, into ``<output_dir>/codes...``.

    Raises:
        ValueError: if a source, a split or a column is missing, a source is empty, codes are of another tokenizer, or a row
            is longer than the backbone can read.
    """
    config, data, output = context.config, context.config.data, Path(context.config.output_dir)
    several = bool(data.sources)
    _check_splits(context)
    sources: list[Source] = []
    checks: dict[str, Check] = {}
    rows: dict[str, datasets.Dataset] = {}
    grids: set[Grid] = set()
    for number, settings in enumerate(config.all_sources()):
        name, folder = (f"sources.{number}", f"codes-{number}") if several else ("train", "codes")
        sources.append(open_source(context, settings, settings.split, output / folder))
        rows[name] = sources[-1].rows
        grids.update(grids_of(sources[-1].rows, settings.kind))
        if not config.validate_every or not settings.validation_split:
            continue
        path = held_out_path(data, settings)
        held_out = open_source(
            context,
            replace(settings, path=path),
            settings.validation_split,
            output / f"{folder}-validation",
            clean=True,
        )
        rows[f"{name}.validation" if several else "validation"] = held_out.rows
        loss = f"{settings.kind}_validation_loss" if several else "validation_loss"
        checks[loss if loss not in checks else f"{loss}_{number}"] = _check(context, held_out, LOSSES[settings.kind])
        if not several:
            checks |= _further_checks(context, sources[0], held_out)
    if context.text_tokenizer is not None:
        for source in sources:
            share = bytes_per_token(source, context.text_tokenizer, context.model_config.vocabulary)
            if share < SPELT:
                context.accelerator.print(
                    f"{source.name}: {share:.1f} bytes of text a token, so the text tokenizer spells many words, which a model "
                    "learns slowly; recipes/train_text_tokenizer.py makes one of this text"
                )
    batches = Batches(
        sources, context.model_config, config.batch_size, config.steps * config.gradient_accumulation_steps, config.seed,
        *data_rank(context.accelerator), data.pack, data.bucket,
        partial(merge_of_batch, config, config.patch_schedule()),
        {o.name: partial(o.further, config=context.model_config) for o in config.build_objectives()},
    )  # fmt: skip
    shares = zip(sources, batches.shares, strict=True)
    summary = ", ".join(f"{share / 10:g} % {source.name} ({len(source.rows)} rows)" for source, share in shares)
    return TrainingData(batches, checks, rows, sorted(grids), summary)


def _check_splits(context: Context) -> None:
    """Open what is not encoded yet, so that a missing file or split shows before the images of another are encoded.

    Raises:
        ValueError: naming the source.
    """
    config, data, output = context.config, context.config.data, Path(context.config.output_dir)
    for number, settings in enumerate(config.all_sources()):
        folder = f"codes-{number}" if data.sources else "codes"
        held_out = held_out_path(data, settings)
        parts = [(settings.path, settings.split, folder)]
        if config.validate_every and settings.validation_split:
            if held_out == settings.path:
                field = "data.sources.validation_split" if data.sources else "data.validation"
                check_splits(settings.path, settings.split, settings.validation_split, field)
            parts.append((held_out, settings.validation_split, f"{folder}-validation"))
        for path, split, encoded in parts:
            if is_codes_cache(path) and part_of(split) is not None:
                raise ValueError(
                    f"data.validation: {path!r} holds codes already, of which a share cannot be told by the images; give it to "
                    "recipes/encode_images.py as --validation."
                )
            if not is_codes_cache(path) and not is_codes_cache(output / encoded):
                streaming = data.streaming and settings.kind != "text"
                load_source(path, base_split(split), streaming, data.storage_options or None)


def held_out_path(data: DataConfig, source: SourceConfig) -> str:
    """Where the held-out rows of a source lie."""
    return data.validation if isinstance(data.validation, str) and not data.sources else source.path


def merge_of_batch(config: TrainConfig, schedule: PatchSchedule, index: int) -> Merge | None:
    """How codes are merged in micro-batch ``index``: by the patch size of its step; None for the model's own way."""
    patch_size = schedule.patch_size(index // config.gradient_accumulation_steps, config.steps)
    return None if patch_size == 1 else patches(patch_size)


def _check(context: Context, source: Source, loss: str) -> Check:
    batch_size, config = context.config.batch_size, context.model_config

    def check(model: nn.Module, device: torch.device) -> float:
        return mean_loss(model, in_order(source, config, batch_size), device, loss)

    return check


def _further_checks(context: Context, train: Source, held_out: Source) -> dict[str, Check]:
    """For a single source: the loss on as many rows that the model has seen, and that of captions after images."""
    every = np.arange(len(train.rows)) if train.images is None else train.images[:-1]  # one view of an image
    seen = train.rows.select(every[: len(held_out.rows)])
    checks = {"train_subset_loss": _check(context, replace(held_out, rows=seen), "image_loss")}
    if context.config.data.captioning:
        captions = replace(held_out, sequence=partial(held_out.sequence, captioning=1.0))  # type: ignore[call-arg]
        checks["caption_loss"] = _check(context, captions, "text_loss")
    return checks

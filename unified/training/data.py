"""From a run's data settings to its batches, and to the losses that are measured on held-out rows."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import torch
from accelerate import Accelerator, PartialState
from torch import nn

from unified.config import UnifiedConfig
from unified.conversation import DEFAULT_TEMPLATE
from unified.data import SkipReport, load_source
from unified.data.batches import Batches, Source, first_views, in_order
from unified.data.captioned import captioned_sequence, text_sequence
from unified.data.chat import chat_sequence, encode_chat
from unified.data.code_cache import (
    description_of,
    encode_source,
    is_codes_cache,
    load_codes,
    source_changed,
    vision_key,
)
from unified.data.crops import Views
from unified.data.encoding import FEATURES
from unified.data.held_out import base_split, part_of
from unified.data.interleaved import encode_interleaved, interleaved_sequence
from unified.data.labelled import encode_labelled, labelled_sequence, with_classes
from unified.data.pairs import encode_pairs, pair_sequence
from unified.data.rows import UNREADABLE, class_names, readable
from unified.data.sources import check_splits
from unified.model.vision import VisionEncoder
from unified.prediction.merge import Grid, Merge, patches
from unified.prediction.plan import Prediction
from unified.prediction.schedule import PatchSchedule
from unified.prompts import PromptFormat
from unified.settings import refuse_other
from unified.training.config import DataConfig, SourceConfig, TrainConfig
from unified.training.inputs import check_lengths, code_grids
from unified.training.tensor_parallel import data_rank
from unified.training.validation import mean_loss
from unified_tokenizers import ImageTokenizer, TextTokenizer

Check = Callable[[nn.Module, torch.device], float]
_LOSSES = {"image": "image_loss", "text": "text_loss", "interleaved": "loss", "chat": "loss", "pairs": "image_loss"}


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


class Context(NamedTuple):
    """What all sources of a run share."""

    accelerator: Accelerator
    config: TrainConfig
    image_tokenizer: ImageTokenizer
    text_tokenizer: TextTokenizer | None
    model_config: UnifiedConfig
    vision: VisionEncoder | None = None

    def vision_of(self, source: SourceConfig) -> VisionEncoder | None:
        """The vision encoder for a source with images that are read, None for any other."""
        return self.vision if self.config.data.reads(source) else None


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
        grids.update(_grids(sources[-1].rows, settings.kind))
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
        checks[loss if loss not in checks else f"{loss}_{number}"] = _check(context, held_out, _LOSSES[settings.kind])
        if not several:
            checks |= _further_checks(context, sources[0], held_out)
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


def open_source(context: Context, source: SourceConfig, split: str, folder: Path, clean: bool = False) -> Source:
    """One split of a source; ``clean`` rows have no crops, flips, dropout or noise, and no row is left out."""
    config, text_tokenizer, vocabulary = context.model_config, context.text_tokenizer, context.model_config.vocabulary
    name = f"{source.kind} {source.path!r}"
    if config.classes is not None:
        return _open_labelled(context, source, split, folder, clean)
    check_no_classes(source)
    assert text_tokenizer is not None
    shared: dict[str, Any] = {"text_tokenizer": text_tokenizer, "vocabulary": vocabulary}
    vision = context.vision_of(source)
    if vision is not None:
        shared["feature_size"] = (vision.description["length"], vision.description["width"])
    if source.kind == "pairs":
        rows = _pair_rows(context, source, split, folder)
        first = {"height": [h[0] for h in rows["heights"]], "width": [w[0] for w in rows["widths"]]}
        check_lengths(
            datasets.Dataset.from_dict({**first, "caption": [texts[0] for texts in rows["texts"]]}),
            text_tokenizer,
            config,
        )
        return Source(name, rows, partial(pair_sequence, **shared), source.weight)
    if source.kind != "image":
        limit = getattr(config.text_config, "max_position_embeddings", None)
        if limit is not None and source.max_length > limit:
            raise ValueError(
                f"data.sources: max_length {source.max_length} of {source.path!r} is beyond the {limit} positions of the "
                "backbone; lower it, or raise max_position_embeddings."
            )
        shared["max_length"] = source.max_length
    if source.kind == "text":
        sequence = partial(text_sequence, text_column=source.text_column, **shared)
        return Source(name, _texts(context, source, split), sequence, source.weight)
    if source.kind == "interleaved":
        rows = _interleaved_rows(context, source, split, folder)
        sequence = partial(interleaved_sequence, frame=Prediction.of(config).frame, **shared)
        return Source(name, rows, sequence, source.weight)
    if source.kind == "chat":
        rows = _chat_rows(context, source, split, folder)
        sequence = partial(chat_sequence, template=_chat_template(context), frame=Prediction.of(config).frame, **shared)
        return Source(name, rows, sequence, source.weight)
    data = context.config.data
    rows = _first_samples(_captioned_rows(context, source, split, folder, clean), data, clean)
    if not clean:
        shared |= {
            "caption_dropout": data.caption_dropout if source.caption_dropout is None else source.caption_dropout,
            "captioning": data.captioning if source.captioning is None else source.captioning,
            "code_noise": data.code_noise,
            "train_on_captions": data.train_on_captions,
        }
    shared["prompts"] = PromptFormat.of(config)
    check_lengths(rows, text_tokenizer, config, 0 if vision is None else vision.description["length"])
    images = first_views(rows) if data.one_view and not clean else None
    return Source(name, rows, partial(captioned_sequence, **shared), source.weight, images)


def _open_labelled(context: Context, source: SourceConfig, split: str, folder: Path, clean: bool) -> Source:
    """One split of images with classes. The names of its classes become those of a model that has none yet."""
    config, data = context.model_config, context.config.data
    check_classes(context.config, source)
    assert config.classes is not None and config.conditioning is not None
    rows = _first_samples(_labelled_rows(context, source, split, folder, clean), data, clean)
    names = class_names(rows, "label")
    if names is not None and config.class_names is None:
        if len(names) != config.classes:
            raise ValueError(
                f"model.options.conditioning.classes: {config.classes}, but {source.path!r} has {len(names)} classes; set it to "
                f"{len(names)}."
            )
        config.conditioning = {**config.conditioning, "names": names}
    rows = with_classes(rows, config.classes, config.class_names, source.path)
    check_lengths(rows, None, config)
    options: dict[str, Any] = {"vocabulary": config.vocabulary, "classes": config.classes}
    if not clean:
        dropout = data.caption_dropout if source.caption_dropout is None else source.caption_dropout
        options |= {"dropout": dropout, "code_noise": data.code_noise}
    images = first_views(rows) if data.one_view and not clean else None
    return Source(f"classes {source.path!r}", rows, partial(labelled_sequence, **options), source.weight, images)


def check_classes(config: TrainConfig, source: SourceConfig) -> None:
    """Raises ValueError for settings that a class-conditional model has no use for: it reads no text."""
    data = config.data
    wrong = {
        "data.pack": data.pack is not None,
        "data.captioning": bool(data.captioning or source.captioning),
        "data.train_on_captions": data.train_on_captions,
        "data.caption": source.caption is not None,
        "data.sources.kind": source.kind != "image",
        "sample.prompts": bool(config.sample.prompts),
        "evaluation": config.evaluation is not None,
    }
    for name, given in wrong.items():
        if given and name == "data.pack":
            raise ValueError("condition: not possible in packed rows; leave data.pack out.")
        if given:
            raise ValueError(f"{name}: not for a class-conditional model, which reads no text; leave it out.")


def check_no_classes(source: SourceConfig) -> None:
    """Raises ValueError if a source names its classes for a model that has none."""
    if source.class_column != SourceConfig.class_column:
        raise ValueError(
            f"data.class_column: {source.class_column!r} is for a class-conditional model; set model.options.conditioning, or "
            "leave it out."
        )


def _first_samples(rows: datasets.Dataset, data: DataConfig, clean: bool) -> datasets.Dataset:
    """At most ``data.max_samples`` rows to train on."""
    if clean or data.max_samples is None:
        return rows
    return rows.select(range(min(data.max_samples, len(rows))))


def _views(context: Context, source: SourceConfig, clean: bool) -> Views:
    """Views of images that the run encodes. Raises ValueError if they are codes already, and views are asked for."""
    data = context.config.data
    if is_codes_cache(source.path):
        alone = not data.sources
        if not clean and (source.caption is not None or (alone and (data.crops is not None or data.flips))):
            raise ValueError(f"data: {source.path!r} holds codes already; crops, flips and caption are for images.")
    size = ((data.image_size, data.image_size),)
    if clean:
        return Views(size)
    return Views(size, "center" if data.crops is None else "random", data.crops or 1, flips=data.flips)


def _labelled_rows(context: Context, source: SourceConfig, split: str, folder: Path, clean: bool) -> datasets.Dataset:
    """A split of images with classes as codes; images are encoded once by all processes."""
    data, tokenizer, path = context.config.data, context.image_tokenizer, source.path
    views = _views(context, source, clean)
    if is_codes_cache(path):
        return load_codes(path, split, tokenizer.fingerprint, "labelled")
    max_rows = None if clean else data.max_samples

    def encode() -> dict[str, SkipReport]:
        return encode_labelled(
            tokenizer, path, folder, views, (split,), source.image_column, source.class_column, streaming=data.streaming,
            process=PartialState(), storage_options=data.storage_options or None, max_rows=max_rows,
        )  # fmt: skip

    wanted = {
        "kind": "labelled", "source": path, "columns": [source.image_column, source.class_column],
        "views": views.described(), "max_rows": max_rows,
    }  # fmt: skip
    return load_codes(encode_once(context, folder, split, wanted, encode), split, tokenizer.fingerprint, "labelled")


def _captioned_rows(context: Context, source: SourceConfig, split: str, folder: Path, clean: bool) -> datasets.Dataset:
    """A split of captioned images as codes; images are encoded once by all processes."""
    data, tokenizer, path = context.config.data, context.image_tokenizer, source.path
    views, vision = _views(context, source, clean), context.vision_of(source)
    if is_codes_cache(path):
        return load_codes(path, split, tokenizer.fingerprint, vision=vision)
    max_rows = None if clean else data.max_samples

    def encode() -> dict[str, SkipReport]:
        return encode_source(
            tokenizer, path, folder, (split,), data.image_size, source.image_column, source.caption_column,
            streaming=data.streaming, views=views, process=PartialState(), caption=source.caption,
            storage_options=data.storage_options or None, max_rows=max_rows, vision=vision,
        )  # fmt: skip

    wanted = {
        "source": path, "image_size": data.image_size, "columns": [source.image_column, source.caption_column],
        "views": views.described(), "caption": source.caption,
        "max_rows": max_rows, "vision": vision_key(vision),
    }  # fmt: skip
    return load_codes(encode_once(context, folder, split, wanted, encode), split, tokenizer.fingerprint, vision=vision)


def _interleaved_rows(context: Context, source: SourceConfig, split: str, folder: Path) -> datasets.Dataset:
    data, tokenizer, path = context.config.data, context.image_tokenizer, Path(source.path)
    if not is_codes_cache(path):
        size = (data.image_size, data.image_size)

        def encode() -> dict[str, SkipReport]:
            return encode_interleaved(
                tokenizer, source.path, folder, (split,), (size,), source.segments_column, streaming=data.streaming,
                process=PartialState(), storage_options=data.storage_options or None,
            )  # fmt: skip

        wanted = {"source": source.path, "sizes": [list(size)], "columns": [source.segments_column]}
        path = encode_once(context, folder, split, wanted, encode)
    return load_codes(path, split, tokenizer.fingerprint, "interleaved").with_format(None)


def _chat_rows(context: Context, source: SourceConfig, split: str, folder: Path) -> datasets.Dataset:
    data, tokenizer, path = context.config.data, context.image_tokenizer, Path(source.path)
    columns, vision = (source.images_column, source.messages_column), context.vision_of(source)
    if not is_codes_cache(path):
        size = (data.image_size, data.image_size)

        def encode() -> dict[str, SkipReport]:
            return encode_chat(
                tokenizer, source.path, folder, (split,), size, columns, streaming=data.streaming,
                process=PartialState(), storage_options=data.storage_options or None, vision=vision,
            )  # fmt: skip

        wanted = {
            "kind": "chat", "source": source.path, "sizes": [list(size)], "columns": list(columns), "vision": vision_key(vision),
        }  # fmt: skip
        path = encode_once(context, folder, split, wanted, encode)
    rows = load_codes(path, split, tokenizer.fingerprint, "chat", vision).with_format(None)
    return rows if vision is None else rows.with_format("numpy", columns=list(FEATURES), output_all_columns=True)


def _chat_template(context: Context) -> str:
    """How conversations are written: as the model's configuration says, which is given the usual way if it says nothing.

    Raises:
        ValueError: if it says nothing and belongs to the base of an adapter, which stays as it is.
    """
    config, text_tokenizer = context.model_config, context.text_tokenizer
    assert text_tokenizer is not None
    if config.chat_template is None:
        if context.config.lora is not None and context.config.model.pipeline is not None:
            raise ValueError(
                f"data.sources: chat rows need a chat_template, and {context.config.model.pipeline!r} has none in its "
                "model/config.json; an adapter cannot bring one. Add it there, or train without lora."
            )
        config.chat_template = text_tokenizer.chat_template or DEFAULT_TEMPLATE
    return config.chat_template


def _pair_rows(context: Context, source: SourceConfig, split: str, folder: Path) -> datasets.Dataset:
    data, tokenizer, path = context.config.data, context.image_tokenizer, Path(source.path)
    columns = (source.chosen_column, source.rejected_column, source.caption_column)
    if not is_codes_cache(path):
        size = (data.image_size, data.image_size)

        def encode() -> dict[str, SkipReport]:
            return encode_pairs(
                tokenizer, source.path, folder, (split,), size, columns, process=PartialState(),
                storage_options=data.storage_options or None,
            )  # fmt: skip

        wanted = {"kind": "pairs", "source": source.path, "sizes": [list(size)], "columns": list(columns)}
        path = encode_once(context, folder, split, wanted, encode)
    return load_codes(path, split, tokenizer.fingerprint, "pairs").with_format(None)


def encode_once(
    context: Context, folder: Path, split: str, wanted: dict[str, Any], encode: Callable[[], dict[str, SkipReport]]
) -> Path:
    """Encode into ``folder`` unless an earlier run did and the source still holds the same images and captions.

    Raises:
        ValueError: if the earlier codes are not what is ``wanted``.
    """
    if is_codes_cache(folder):
        made = description_of(folder)
        splits = {"splits": list(made["rows"])} if "rows" in made else {}
        refuse_other("data", folder, made | splits, wanted | {key: [split] for key in splits})
        if not source_changed(folder, context.config.data.storage_options or None):
            return folder
        context.accelerator.print(f"{wanted['source']} has changed since {folder} was encoded; it is encoded again")
    for split, report in encode().items():
        context.accelerator.print(f"{wanted['source']} ({split}): {report.summary()}")
    return folder


def _texts(context: Context, source: SourceConfig, split: str) -> datasets.Dataset:
    """The rows of a split that have a text."""
    options = context.config.data.storage_options or None
    rows = load_source(source.path, split, storage_options=options, content_column=source.text_column)
    assert isinstance(rows, datasets.Dataset)  # not streamed
    column = source.text_column
    if column not in rows.column_names:
        raise ValueError(
            f"data.sources: text_column {column!r} is not a column of {source.path!r}; it has {sorted(rows.column_names)}."
        )
    report, used = SkipReport(), []
    known = [name for name in (column, UNREADABLE) if name in rows.column_names]
    for number, row in enumerate(rows.select_columns(known)):
        text = row[column]
        if not readable(row, report, number):
            continue
        if isinstance(text, str) and text.strip():
            used.append(number)
        else:
            report.skip("empty_caption", number, f"text {text!r}")
    report.used = len(used)
    if report.skipped:
        context.accelerator.print(f"{source.path} ({split}): {report.summary()}")
    return rows.select_columns(column).select(used)


def _grids(rows: datasets.Dataset, kind: str) -> list[Grid]:
    if kind == "image":
        return code_grids(rows)
    if kind == "text":
        return []
    sizes = rows.select_columns(["heights", "widths"])
    return [(h, w) for row in sizes for h, w in zip(row["heights"], row["widths"], strict=True)]


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

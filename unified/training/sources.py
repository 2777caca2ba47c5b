"""Each kind of source: its rows, whose images are encoded once, and the sequences made of them."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import datasets
from accelerate import Accelerator, PartialState

from unified.config import UnifiedConfig
from unified.conversation import DEFAULT_TEMPLATE
from unified.data import SkipReport, load_source
from unified.data.batches import Source, first_views
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
from unified.data.interleaved import encode_interleaved, interleaved_sequence
from unified.data.labelled import encode_labelled, labelled_sequence, with_classes
from unified.data.pairs import encode_pairs, pair_sequence
from unified.data.rows import UNREADABLE, class_names, readable
from unified.model.vision import VisionEncoder
from unified.prediction.merge import Grid
from unified.prediction.plan import Prediction
from unified.prompts import PromptFormat
from unified.settings import refuse_other
from unified.training.config import TrainConfig
from unified.training.data_config import DataConfig, SourceConfig
from unified.training.inputs import check_lengths, code_grids
from unified_tokenizers import ImageTokenizer, TextTokenizer

# The loss that is measured on held-out rows of each kind.
LOSSES = {"image": "image_loss", "text": "text_loss", "interleaved": "loss", "chat": "loss", "pairs": "image_loss"}


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


def open_source(context: Context, source: SourceConfig, split: str, folder: Path, clean: bool = False) -> Source:
    """One split of a source; images are encoded once, into ``folder``.

    ``clean`` rows have no crops, flips, dropout or noise, and no row is left out.
    """
    if context.model_config.classes is not None:
        return _labelled(context, source, split, folder, clean)
    check_no_classes(source)
    return _OPENED[source.kind](context, source, split, folder, clean)


def _shared(context: Context, source: SourceConfig) -> dict[str, Any]:
    """Arguments of the sequences of every kind that has text."""
    assert context.text_tokenizer is not None
    shared: dict[str, Any] = {"text_tokenizer": context.text_tokenizer, "vocabulary": context.model_config.vocabulary}
    vision = context.vision_of(source)
    if vision is not None:
        shared["feature_size"] = (vision.description["length"], vision.description["width"])
    return shared


def _limited(context: Context, source: SourceConfig) -> dict[str, Any]:
    """As :func:`_shared`, of kinds whose rows are cut to ``max_length``. Raises ValueError if it is beyond the backbone."""
    limit = getattr(context.model_config.text_config, "max_position_embeddings", None)
    if limit is not None and source.max_length > limit:
        raise ValueError(
            f"data.sources: max_length {source.max_length} of {source.path!r} is beyond the {limit} positions of the "
            "backbone; lower it, or raise max_position_embeddings."
        )
    return {**_shared(context, source), "max_length": source.max_length}


def _captioned(context: Context, source: SourceConfig, split: str, folder: Path, clean: bool) -> Source:
    """Captioned images."""
    config, data, shared = context.model_config, context.config.data, _shared(context, source)
    rows = _first_samples(_captioned_rows(context, source, split, folder, clean), data, clean)
    if not clean:
        shared |= {
            "caption_dropout": data.caption_dropout if source.caption_dropout is None else source.caption_dropout,
            "captioning": data.captioning if source.captioning is None else source.captioning,
            "code_noise": data.code_noise,
            "train_on_captions": data.train_on_captions,
        }
    shared["prompts"] = PromptFormat.of(config)
    vision = context.vision_of(source)
    check_lengths(rows, context.text_tokenizer, config, 0 if vision is None else vision.description["length"])
    images = first_views(rows) if data.one_view and not clean else None
    return Source(source.name, rows, partial(captioned_sequence, **shared), source.weight, images)


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


def _labelled(context: Context, source: SourceConfig, split: str, folder: Path, clean: bool) -> Source:
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


def _text(context: Context, source: SourceConfig, split: str, folder: Path, clean: bool) -> Source:
    """Plain texts."""
    sequence = partial(text_sequence, text_column=source.text_column, **_limited(context, source))
    return Source(source.name, _texts(context, source, split), sequence, source.weight)


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


def _interleaved(context: Context, source: SourceConfig, split: str, folder: Path, clean: bool) -> Source:
    """Texts and images in turn."""
    limited = _limited(context, source)
    rows = _interleaved_rows(context, source, split, folder)
    sequence = partial(interleaved_sequence, frame=Prediction.of(context.model_config).frame, **limited)
    return Source(source.name, rows, sequence, source.weight)


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


def _chat(context: Context, source: SourceConfig, split: str, folder: Path, clean: bool) -> Source:
    """Conversations."""
    limited = _limited(context, source)
    rows = _chat_rows(context, source, split, folder)
    frame = Prediction.of(context.model_config).frame
    sequence = partial(chat_sequence, template=_chat_template(context), frame=frame, **limited)
    return Source(source.name, rows, sequence, source.weight)


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


def _pairs(context: Context, source: SourceConfig, split: str, folder: Path, clean: bool) -> Source:
    """Pairs of images for a caption, of which one is preferred."""
    shared, rows = _shared(context, source), _pair_rows(context, source, split, folder)
    first = {"height": [h[0] for h in rows["heights"]], "width": [w[0] for w in rows["widths"]]}
    captions = [texts[0] for texts in rows["texts"]]
    check_lengths(
        datasets.Dataset.from_dict({**first, "caption": captions}), context.text_tokenizer, context.model_config
    )
    return Source(source.name, rows, partial(pair_sequence, **shared), source.weight)


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


def grids_of(rows: datasets.Dataset, kind: str) -> list[Grid]:
    """Code grids of the images of a source of some kind."""
    if kind == "image":
        return code_grids(rows)
    if kind == "text":
        return []
    sizes = rows.select_columns(["heights", "widths"])
    return [(h, w) for row in sizes for h, w in zip(row["heights"], row["widths"], strict=True)]


_OPENED: dict[str, Callable[[Context, SourceConfig, str, Path, bool], Source]] = {
    "image": _captioned,
    "text": _text,
    "interleaved": _interleaved,
    "chat": _chat,
    "pairs": _pairs,
}

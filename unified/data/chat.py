"""Chat rows: conversations about images in turns of roles, encoded once, and as sequences whose replies are in the loss."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from accelerate import PartialState
from torch import Tensor

from unified.config import Vocabulary
from unified.conversation import Turn, conversation_segments, read_messages
from unified.data.captioned import features_of, grids_of
from unified.data.code_cache import Prepared, first_rows, source_split, vision_key, write_cache
from unified.data.crops import Size
from unified.data.encoding import Features, Numbered, feature_columns
from unified.data.interleaved import SEGMENT_COLUMNS, segment_records
from unified.data.rows import Rows, SkipReport, check_column, column_names, readable
from unified.data.sources import load_source
from unified.prediction.frame import Frame
from unified.sequence import ImageSegment, TokenSequence, build_sequence
from unified_tokenizers import TextTokenizer
from unified_tokenizers.base import ImageTokenizer

# Of each segment the role that begins to speak with it, null where a turn goes on.
CHAT_COLUMNS = datasets.Features({**SEGMENT_COLUMNS, "roles": datasets.List(datasets.Value("string"))})


def encode_chat(
    tokenizer: ImageTokenizer,
    source: str,
    out: str | Path,
    splits: tuple[str, ...] = ("train", "validation"),
    size: Size = (64, 64),
    columns: tuple[str, str] = ("images", "messages"),
    batch_size: int = 64,
    streaming: bool = False,
    block_rows: int = 256,
    process: PartialState | None = None,
    storage_options: dict[str, Any] | None = None,
    max_rows: int | None = None,
    validation: float | None = None,
    vision: Features | None = None,
) -> dict[str, SkipReport]:
    """Encode the images of conversations and write an Arrow data set of texts, roles, codes and grids.

    A row without a reply, with a broken image, or that :func:`unified.conversation.read_messages` refuses, is skipped and
    reported.

    Args:
        tokenizer, source, out, splits, batch_size, streaming, block_rows, process, storage_options, max_rows, validation: as
            in :func:`unified.data.code_cache.encode_source`; a share is held out by the images, so that none is on both sides.
        size: height and width in pixels that images are fitted to.
        columns: with the lists of images, which conversations of texts alone do not need, and with the messages.
        vision: also keep the features of a vision encoder, of the images that the assistant does not generate.

    Raises:
        ValueError: as :func:`unified.data.code_cache.encode_source`.
    """
    images, messages = columns
    settings = {
        "kind": "chat", "source": source, "sizes": [list(size)], "block_rows": block_rows, "columns": list(columns),
        "max_rows": max_rows, "validation": validation, "vision": vision_key(vision),
    }  # fmt: skip

    def load(split: str) -> Rows:
        return first_rows(
            load_source(source, source_split(split, validation), streaming, storage_options, images), max_rows
        )

    def prepare(rows: Rows) -> Prepared:
        check_column(rows, "messages_column", messages)

        def make(numbered: Numbered, report: SkipReport) -> list[dict[str, Any]]:
            roles: dict[int, list[str | None]] = {}
            segments = _segments(numbered, report, columns, roles)
            records = segment_records(tokenizer, segments, report, [size], "segments", batch_size, vision)
            return [record | {"roles": roles[record["source_row"]]} for record in records]

        return _undecoded(rows, images), make, datasets.Features({**CHAT_COLUMNS, **feature_columns(vision)})

    return write_cache(tokenizer, out, splits, [size], settings, load, prepare, block_rows, batch_size, process)


def chat_sequence(
    row: dict[str, Any],
    rng: np.random.Generator | None,
    text_tokenizer: TextTokenizer,
    vocabulary: Vocabulary,
    template: str,
    max_length: int,
    frame: Frame | None = None,
    feature_size: tuple[int, int] | None = None,
) -> TokenSequence:
    """A row of the cache as one sequence, of which the replies are in the loss; nothing is random.

    Later exchanges are left out where the row is longer than ``max_length`` tokens. ``frame`` is that of the model's images;
    ``feature_size`` is P and F of the row's ``features``, which stand for the images that are read.

    Raises:
        ValueError: if not even the first reply fits, or the row is none of :func:`encode_chat`.
    """
    turns = _turns(row)
    if feature_size is not None:
        turns = _read_by_features(turns, row["features"], feature_size)
    ends = [number + 1 for number, turn in enumerate(turns) if turn.role == "assistant"]
    for end in reversed(ends):
        segments = conversation_segments(turns[:end], text_tokenizer, template)
        sequence = build_sequence(segments, vocabulary)
        length = len(sequence.input_ids)
        if frame is not None:
            grids = [segment.codes.shape for segment in segments if isinstance(segment, ImageSegment)]
            length += sum(len(frame.tokens((h, w))) - h * w for h, w in grids)
        if length <= max_length:
            return sequence
    raise ValueError(
        f"max_length: {max_length} has no room for the first reply of a row, which needs {length}; raise it."
    )


def chat_texts(rows: Rows, report: SkipReport, columns: tuple[str, str] = ("images", "messages")) -> Iterator[str]:
    """Yield what is said in conversations, and the name of each role that speaks; unusable rows go to ``report``.

    Raises:
        ValueError: if there is no such column of messages.
    """
    check_column(rows, "messages_column", columns[1])
    for number, row in enumerate(_undecoded(rows, columns[0])):
        turns = _read(row, report, number, columns)
        for turn in turns or ():
            yield turn.role
            yield from (part for part in turn.parts if isinstance(part, str))
        report.used += turns is not None


def _turns(row: dict[str, Any]) -> list[Turn]:
    """The turns of a row of the cache, with codes for images. Raises ValueError if it is none."""
    texts, roles = row["texts"], row["roles"]
    images = iter(grids_of(row["codes"], row["heights"], row["widths"]))
    if len(texts) != len(roles) or not roles or roles[0] is None or "assistant" not in roles:
        raise ValueError(f"roles: {list(roles)} of {len(texts)} segments are no conversation; encode the source again.")
    if sum(text is None for text in texts) != len(row["heights"]):
        raise ValueError(f"texts: {texts} for {len(row['heights'])} images; encode the source again.")
    turns: list[Turn] = []
    for text, role in zip(texts, roles, strict=True):
        part = next(images) if text is None else str(text)
        if role is None:
            turns[-1] = Turn(turns[-1].role, (*turns[-1].parts, part))
        else:
            turns.append(Turn(str(role), (part,)))
    return turns


def _read_by_features(turns: list[Turn], values: Any, size: tuple[int, int]) -> list[Turn]:
    """The same turns with features for the images that the assistant does not generate."""
    read = [isinstance(part, Tensor) for turn in turns if turn.role != "assistant" for part in turn.parts]
    features = iter(features_of(values, sum(read), size))
    return [
        turn
        if turn.role == "assistant"
        else Turn(turn.role, tuple(next(features) if isinstance(part, Tensor) else part for part in turn.parts))
        for turn in turns
    ]


def _segments(
    rows: Numbered, report: SkipReport, columns: tuple[str, str], roles: dict[int, list[str | None]]
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Rows as lists of texts and images, as interleaved data have them; ``roles`` gets those of each row."""
    for number, row in rows:
        turns = _read(row, report, number, columns)
        if turns is None:
            continue
        roles[number] = [turn.role if place == 0 else None for turn in turns for place in range(len(turn.parts))]
        segments = [
            {"text": part, "image": None}
            if isinstance(part, str)
            else {"image": part, "read": turn.role != "assistant"}
            for turn in turns
            for part in turn.parts
        ]
        yield number, {"segments": segments}


def _read(row: dict[str, Any], report: SkipReport, number: int, columns: tuple[str, str]) -> list[Turn] | None:
    """The turns of a row of a source, or None and a note in ``report``."""
    if not readable(row, report, number):
        return None
    try:
        turns = read_messages(row[columns[1]], row.get(columns[0]))
        if not any(turn.role == "assistant" for turn in turns):
            raise ValueError("messages: nobody replies; add a turn of the role assistant.")
    except ValueError as error:
        report.skip("unreadable_row", number, str(error))
        return None
    return turns


def _undecoded(rows: Rows, column: str) -> Rows:
    if rows.features is None or column not in column_names(rows):
        return rows  # a stream that decodes nothing, or conversations without images
    try:
        return rows.cast_column(column, datasets.List(datasets.Image(decode=False)))
    except (TypeError, ValueError) as error:
        raise ValueError(f"images_column: {column!r} must hold lists of images ({error}).") from error

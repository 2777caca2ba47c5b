"""Questions about images: those of chat rows, a pipeline's answers, and how many are exact beside guesses without a look."""

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import datasets
import numpy as np

from unified import UnifiedPipeline
from unified.conversation import Turn, read_messages
from unified.data import SkipReport, load_source
from unified.data.rows import check_column, open_rgb, readable
from unified.decoding import Sampling
from unified.lora.base import base_of
from unified.pipeline.chat import fit_image, message
from unified_eval.caption_metrics import normalised
from unified_eval.extraction import batches
from unified_eval.results import Bound, Results

NO_KIND = "question"


class Asked(NamedTuple):
    """The first question of a row: what is said up to it, its words, the answer, its kind and the row's number."""

    turns: list[Turn]
    text: str
    answer: str
    kind: str
    row: int


def read_questions(
    source: str, split: str, columns: tuple[str, str] = ("images", "messages"), kind_column: str = "kind",
    most: int | None = None, report: SkipReport | None = None,
) -> list[Asked]:  # fmt: skip
    """The first question of each of the first ``most`` rows of a source of conversations that begins with one and has a text as
    its answer; images stay undecoded.

    Args:
        source, split: as for :func:`unified.data.sources.load_source`.
        columns: with the images and with the messages.
        kind_column: column with the kind of the first question; all are of one kind without it.
        most: rows to read; None for all.
        report: counts what is left out.

    Raises:
        ValueError: if there is no such column of messages, or no such row.
    """
    images, messages = columns
    rows, report = load_source(source, split, image_column=images), SkipReport() if report is None else report
    assert isinstance(rows, datasets.Dataset)  # because it is not streamed
    check_column(rows, "messages_column", messages)
    if images in rows.column_names:
        rows = rows.cast_column(images, datasets.List(datasets.Image(decode=False)))
    found = []
    for number, row in enumerate(rows.select(range(min(len(rows), most or len(rows))))):
        if not readable(row, report, number):
            continue
        try:
            turns = read_messages(row[messages], row.get(images))
            replies = [place for place, turn in enumerate(turns) if turn.role == "assistant"]
            if not replies or replies[0] == 0 or not isinstance(turns[replies[0]].parts[-1], str):
                raise ValueError("messages: they do not begin with a question that has a text as its answer.")
        except ValueError as error:
            report.skip("unreadable_row", number, str(error))
            continue
        asked, answer = turns[: replies[0]], turns[replies[0]].parts[-1]
        words = " ".join(part for turn in asked for part in turn.parts if isinstance(part, str))
        found.append(Asked(asked, words, answer, str(row.get(kind_column) or NO_KIND), number))
        report.used += 1
    if not found:
        raise ValueError(f"source: split {split!r} of {source!r} has no question with an answer.\n{report.summary()}")
    return found


class Said(NamedTuple):
    """A pipeline's answer, and what it said to the request before the question, if one was made."""

    answer: str
    first: str | None = None


def answers_of(
    pipeline: UnifiedPipeline, asked: Sequence[Asked], max_new_tokens: int = 16, batch_size: int = 64,
    ask_first: str = "",
) -> Iterator[Said]:  # fmt: skip
    """The likeliest answer of a pipeline to each question, in words alone.

    Args:
        asked: the questions.
        max_new_tokens: of each reply.
        batch_size: questions at once.
        ask_first: a request that stands between image and question, such as "list the shapes."; the pipeline replies to it, and
            then to the question with its own reply in front (chain of thought), if it said anything; empty for none.

    Raises:
        ValueError: if it was not trained on conversations, or an image cannot be read or is too small.
    """
    config, stride = base_of(pipeline.model).config, pipeline.image_tokenizer.downsample

    def as_message(turn: Turn) -> dict[str, Any]:
        parts = (part if isinstance(part, str) else fit_image(open_rgb(part), config, stride) for part in turn.parts)
        return message(turn.role, *parts)

    for part in batches(asked, batch_size):
        conversations = [[as_message(turn) for turn in each.turns] for each in part]
        if not ask_first:
            yield from map(Said, replies_to(pipeline, conversations, max_new_tokens))
            continue
        begun = [_with_request(messages, ask_first) for messages in conversations]
        first = replies_to(pipeline, begun, max_new_tokens)
        whole = [
            [*request, {"role": "assistant", "content": reply}, _words_alone(messages[-1])]
            if reply.strip()
            else messages
            for messages, request, reply in zip(conversations, begun, first, strict=True)
        ]
        yield from map(Said, replies_to(pipeline, whole, max_new_tokens), first)


def replies_to(pipeline: UnifiedPipeline, conversations: Sequence[Sequence[Any]], max_new_tokens: int) -> list[str]:
    """The likeliest reply of a pipeline to each conversation, in words alone."""
    found = pipeline.chat(conversations, max_new_tokens, 0, Sampling(top_k=1))
    return [" ".join(text for text in reply if isinstance(text, str)) for reply in found]


def _with_request(messages: Sequence[dict[str, Any]], request: str) -> list[dict[str, Any]]:
    """The messages with a request in the place of the last one's words."""
    *before, last = messages
    images = [part for part in last["content"] if part["type"] == "image"]
    return [*before, {**last, "content": [*images, {"type": "text", "text": request}]}]


def _words_alone(message: dict[str, Any]) -> dict[str, Any]:
    return {**message, "content": [part for part in message["content"] if part["type"] == "text"]}


def add_accuracy(
    results: Results, asked: Sequence[Asked], answers: Sequence[str], training: Sequence[Asked] = (),
    ask_first: str = "",
) -> None:  # fmt: skip
    """Add the share of exact answers, overall and by kind, and what does not look at images.

    ``vqa_accuracy``, ``vqa_<kind>`` and ``vqa_kind_mean``; ``vqa_majority``: the most frequent answer of each kind among these
    very questions; ``vqa_blind``: the most frequent answer to the same words in ``training``, where that is given. The
    recipes of the answers name what was asked first.

    Raises:
        ValueError: if there are not as many answers as questions, or none.
    """
    if len(asked) != len(answers) or not asked:
        raise ValueError(f"answers: {len(answers)} for {len(asked)} questions; give one for each, 1 or more.")
    right = np.array([normalised(a) == normalised(q.answer) for q, a in zip(asked, answers, strict=True)], dtype=float)
    kinds, groups = [each.kind for each in asked], [f"row {each.row}" for each in asked]
    after = f", after its own reply to {ask_first!r}" if ask_first else ""
    rule: dict[str, Any] = {"formula": "exact match in lower case" + after}

    def add(name: str, values: np.ndarray, label: str, members: Sequence[int], **options: Any) -> None:
        results.add_mean(name, values[members], label, [groups[number] for number in members], **options)

    everything = list(range(len(asked)))
    add("vqa_accuracy", right, "exact answers", everything, **rule)
    frequent = _most_frequent((each.kind, each.answer) for each in asked)
    guessed = np.array([frequent[each.kind] == normalised(each.answer) for each in asked], dtype=float)
    add(
        "vqa_majority", guessed, "majority answer of each kind", everything, given=True,
        bound=Bound("vqa_accuracy", "majority of the kind"), formula="without a look, knowing these answers",
    )  # fmt: skip
    if training:
        words = _most_frequent((each.text, each.answer) for each in training)
        blind = np.array([words.get(each.text) == normalised(each.answer) for each in asked], dtype=float)
        add(
            "vqa_blind", blind, "majority answer to the same words in training", everything, given=True,
            bound=Bound("vqa_accuracy", "by the words"), formula="without a look", n_training=len(training),
        )  # fmt: skip
    for kind in sorted(set(kinds)):
        members = [number for number, other in enumerate(kinds) if other == kind]
        add(f"vqa_{kind}", right, f"exact answers, {kind}", members, **rule)
        add(
            f"vqa_{kind}_majority", guessed, f"majority answer, {kind}", members, given=True,
            bound=Bound(f"vqa_{kind}", "majority of the kind"), formula="without a look, knowing these answers",
        )  # fmt: skip
    mean = float(np.mean([results.metrics[f"vqa_{kind}"] for kind in set(kinds)]))
    results.add("vqa_kind_mean", mean, f"mean over {len(set(kinds))} kinds", n=len(asked), **rule)


def _most_frequent(pairs: Any) -> dict[str, str]:
    """The most frequent answer for each key, in alphabetical order where several are."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for key, answer in pairs:
        counts[key][normalised(answer)] += 1
    return {key: min(found, key=lambda answer: (-found[answer], answer)) for key, found in counts.items()}

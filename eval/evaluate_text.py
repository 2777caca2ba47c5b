"""Measure what a pipeline says about images: captions, answers to questions, and whether it still knows its language.

    python eval/evaluate_text.py --pipeline runs/shapes_chat/vqa/pipeline --questions runs/shapes_chat/data --out runs/evaluation
    python eval/evaluate_text.py --pipeline DIR --captions runs/shapes/data --ask "describe the image." --clip DIR --out DIR
    python eval/evaluate_text.py --pipeline DIR --lora DIR --texts texts.parquet --out DIR

Questions are the first ones of chat rows (`messages`, `images`, and `kind` if there is one); an answer has to be exact. Beside
the accuracy stands what is right without a look at the image. With `--ask-first` the model replies to a request first, such as
"list the shapes.", and answers with that in front of it; the recipe says so. Captions are compared with those of the data set:
BLEU-4, CIDEr-D, exact ones, and with `--clip` whether the image can be found by them. Everything is sampled greedily.

The folder gets `metrics.json` (metrics, 95 % intervals, the recipe of each, and the run), `values.json` (which `compare.py`
compares in pairs with that of another folder), `report.md`, and `captions.jsonl` and `answers.jsonl` with every text.
"""

import argparse
import json
import math
import shlex
import sys
from collections.abc import Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import datasets
import torch

from unified import UnifiedPipeline
from unified.data import SkipReport, load_source
from unified.data.batches import Source, in_order
from unified.data.captioned import text_sequence
from unified.errors import explain_errors
from unified.files import write_json, write_text
from unified.lora.base import base_of
from unified.pipeline.chat import fit_image, message
from unified.registry import add_import_argument, import_extensions
from unified.training.validation import mean_loss
from unified_eval.answers import add_accuracy, answers_of, read_questions, replies_to
from unified_eval.caption_metrics import add_caption_scores, add_retrieval
from unified_eval.clip import load_clip
from unified_eval.command_line import add_column_arguments, check_counts, check_folder, device, plain_settings
from unified_eval.evaluation_report import print_results, shown
from unified_eval.extraction import batches
from unified_eval.generation import load_system
from unified_eval.results import VALUES, Bound, Results, recipe_line
from unified_eval.selection import choose_usable, first_usable_rows, unique_captions


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    argv = import_extensions(argv)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_import_argument(parser)
    parser.add_argument("--pipeline", required=True, help="pipeline folder, or its name on the Hub")
    parser.add_argument("--lora", help="LoRA adapter folder to load into it")
    parser.add_argument("--split", default="validation", help="split of all data (default: %(default)s)")
    parser.add_argument(
        "--max-samples", type=int, default=1000, help="images, questions and texts at most (default: %(default)s)"
    )
    questions = parser.add_argument_group("questions")
    questions.add_argument("--questions", metavar="DATA", help="conversations: data folder, file or Hub name")
    questions.add_argument(
        "--messages-column", default="messages", help="column of the conversations (default: %(default)s)"
    )
    questions.add_argument("--images-column", default="images", help="column of their images (default: %(default)s)")
    questions.add_argument(
        "--kind-column", default="kind", help="column of the kinds of questions (default: %(default)s)"
    )
    questions.add_argument(
        "--training-split", default="train",
        help="split whose answers a guess by the words is taken from; 'none' leaves it out (default: %(default)s)",
    )  # fmt: skip
    questions.add_argument(
        "--ask-first", metavar="REQUEST", default="",
        help="asked before each question, such as 'list the shapes.': the model answers with its own reply in front",
    )  # fmt: skip
    captions = parser.add_argument_group("captions")
    captions.add_argument("--captions", metavar="DATA", help="captioned images: data folder, file or Hub name")
    captions.add_argument(
        "--ask",
        help="how a model of conversations is asked for a caption; without it the caption follows the image",
    )
    captions.add_argument(
        "--clip", help="CLIP folder, open_clip 'architecture/tag', or 'hf-hub:owner/name', for retrieval"
    )
    add_column_arguments(captions)
    texts = parser.add_argument_group("texts")
    texts.add_argument(
        "--texts", metavar="DATA", help="plain texts, for their perplexity: data folder, file or Hub name"
    )
    texts.add_argument("--text-column", default="text", help="column of the texts (default: %(default)s)")
    texts.add_argument(
        "--max-length", type=int, default=512, help="tokens that a text is cut to (default: %(default)s)"
    )
    parser.add_argument(
        "--max-new-tokens", type=int, default=48, help="of a caption or an answer (default: %(default)s)"
    )
    parser.add_argument("--batch-size", type=int, default=64, help="images at once (default: %(default)s)")
    parser.add_argument(
        "--resamples", type=int, default=200, help="for the interval of BLEU, 0 for none (default: %(default)s)"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="of the choice of captions and of intervals (default: %(default)s)"
    )
    parser.add_argument("--device", type=device, default="cpu", help="device of all networks (default: %(default)s)")
    parser.add_argument("--out", type=Path, required=True, help="folder to write; earlier results in it are replaced")
    return parser.parse_args(argv)


def check_arguments(args: argparse.Namespace) -> None:
    """Raise ValueError for mistakes that the arguments alone show."""
    if not (args.questions or args.captions or args.texts):
        raise ValueError("--questions, --captions, --texts: none is given; name what to measure.")
    check_counts(args, "max_samples", "max_new_tokens", "batch_size")
    check_folder("out", args.out)
    for name, data in {"clip": "captions", "ask": "captions", "ask_first": "questions"}.items():
        if getattr(args, name) and not getattr(args, data):
            raise ValueError(f"--{name.replace('_', '-')}: it is for --{data}; give those, or leave it out.")
    if args.resamples < 0 or args.resamples == 1:
        raise ValueError(f"--resamples: {args.resamples} gives no interval; give 2 or more, or 0 for none.")
    if args.seed < 0:
        raise ValueError(f"--seed: {args.seed} is below 0.")
    if args.max_length < 2:
        raise ValueError(f"--max-length: {args.max_length} is below 2.")


def measure_questions(args: argparse.Namespace, pipeline: UnifiedPipeline, results: Results) -> list[dict[str, Any]]:
    """Ask, add the accuracy, and return every question with its answers."""
    columns, report = (args.images_column, args.messages_column), SkipReport()
    asked = read_questions(args.questions, args.split, columns, args.kind_column, args.max_samples, report)
    print(f"{args.questions} [{args.split}]: {report.summary()}")
    training = [] if args.training_split == "none" else read_questions(args.questions, args.training_split, columns)
    said = list(answers_of(pipeline, asked, args.max_new_tokens, args.batch_size, args.ask_first))
    add_accuracy(results, asked, [each.answer for each in said], training, args.ask_first)
    return [
        {"row": each.row, "kind": each.kind, "question": each.text, "answer": each.answer, "said": reply.answer,
         **({} if reply.first is None else {"said_first": reply.first})}
        for each, reply in zip(asked, said, strict=True)
    ]  # fmt: skip


def measure_captions(args: argparse.Namespace, pipeline: UnifiedPipeline, results: Results) -> list[dict[str, Any]]:
    """Write captions, add their scores, and return them with their references."""
    rows, report = first_usable_rows(
        args.captions, args.split, image_column=args.image_column, caption_column=args.caption_column
    )
    print(f"{args.captions} [{args.split}]: {report.summary()}")
    distinct = unique_captions(rows)  # a repeated one would be right of several images
    chosen = choose_usable(distinct, min(args.max_samples, len(distinct)), args.seed)
    config, stride = base_of(pipeline.model).config, pipeline.image_tokenizer.downsample
    images = [fit_image(row.image, config, stride) for row in chosen]
    said: list[str] = []
    for part in batches(images, args.batch_size):
        if args.ask is None:
            said += pipeline.caption(part, max_new_tokens=args.max_new_tokens, top_k=1)
        else:
            said += replies_to(pipeline, [[message("user", image, args.ask)] for image in part], args.max_new_tokens)
    references = [row.caption for row in chosen]
    add_caption_scores(results, said, [[reference] for reference in references])
    if args.clip:
        clip = load_clip(args.clip)
        clip.model.to(args.device)
        add_retrieval(results, clip, images, said, references, args.batch_size)
    return [{"row": row.row, "caption": row.caption, "said": text} for row, text in zip(chosen, said, strict=True)]


def measure_texts(args: argparse.Namespace, pipeline: UnifiedPipeline, results: Results) -> None:
    """Add the perplexity of texts and, of an adapter, that of its base."""
    rows = load_source(args.texts, args.split, content_column=args.text_column)
    assert isinstance(rows, datasets.Dataset)  # because it is not streamed
    if args.text_column not in rows.column_names:
        raise ValueError(
            f"--text-column: {args.text_column!r} is not a column of {args.texts!r}; it has {rows.column_names}."
        )
    used = [number for number, text in enumerate(rows[args.text_column]) if isinstance(text, str) and text.strip()]
    rows, model = rows.select(used[: args.max_samples]), base_of(pipeline.model)
    if not len(rows):
        raise ValueError(f"--texts: split {args.split!r} of {args.texts!r} has no text in {args.text_column!r}.")
    sequence = partial(
        text_sequence, text_tokenizer=pipeline.text_tokenizer, vocabulary=model.config.vocabulary,
        text_column=args.text_column, max_length=args.max_length,
    )  # fmt: skip
    source = Source("texts", rows, sequence)

    def perplexity() -> float:
        batch_size = min(args.batch_size, 8)
        return math.exp(
            mean_loss(model, in_order(source, model.config, batch_size), torch.device(args.device), "text_loss")
        )

    recipe = {
        "n": len(rows),
        "reference": args.texts,
        "formula": f"exp of the mean over tokens, texts cut to {args.max_length}",
    }
    results.add("text_perplexity", perplexity(), "perplexity of texts", **recipe)
    if args.lora:
        pipeline.disable_lora()
        results.add(
            "text_perplexity_base", perplexity(), "perplexity of texts, without the adapter", given=True,
            bound=Bound("text_perplexity", "without the adapter"), **recipe,
        )  # fmt: skip
        pipeline.enable_lora()


def report(args: argparse.Namespace, results: Results) -> str:
    """The metrics as Markdown, with their intervals and recipes, and the command."""
    system = args.pipeline + (f" with {args.lora}" if args.lora else "")
    lines = [
        f"# What {system} says",
        "",
        "In brackets: 95 % intervals over images, questions or texts.",
        "",
        "| metric | value | recipe |",
        "|---|---:|---|",
    ]
    for value in results.values.values():
        cells = (value.recipe["label"], shown(value.number, value.interval), recipe_line(value.recipe))
        lines.append(f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |")
    command = shlex.join(["python", *sys.argv])
    return "\n".join([*lines, "", *(f"- {note}" for note in results.notes), f"```\n{command}\n```", ""])


def main(argv: Sequence[str] | None = None) -> None:
    """Measure one pipeline; write and print."""
    # 1. Read the command line, load the pipeline.
    args = parse_arguments(argv)
    check_arguments(args)
    pipeline, identity = load_system(args.pipeline, args.lora)
    pipeline.to(args.device)
    results = Results([], args.resamples, args.seed)

    # 2. Measure.
    said: dict[str, list[dict[str, Any]]] = {}
    if args.questions:
        said["answers"] = measure_questions(args, pipeline, results)
    if args.captions:
        said["captions"] = measure_captions(args, pipeline, results)
    if args.texts:
        measure_texts(args, pipeline, results)

    # 3. Write.
    results.prompts = [f"{name} {each['row']}" for name, texts in said.items() for each in texts]
    run = {**plain_settings(args), **identity, "versions": {name: version(name) for name in ("torch", "transformers")}}
    for name, texts in said.items():
        write_text(args.out / f"{name}.jsonl", "".join(json.dumps(each, ensure_ascii=False) + "\n" for each in texts))
    write_json(args.out / "metrics.json", {**results.result(), "run": run})
    results.save(args.out / VALUES)
    write_text(args.out / "report.md", report(args, results))
    print_results(results)
    print(f"\n{args.out / 'metrics.json'}\n{args.out / 'report.md'}")


if __name__ == "__main__":
    explain_errors(main)

"""The commands of ``unified`` that are scripts of recipes/ and eval/: each is imported when it runs."""

import sys
from collections.abc import Sequence
from importlib import import_module
from typing import NamedTuple


class Script(NamedTuple):
    """A script with a ``main(argv)``: its module, what it does, and the extra of the project that it needs."""

    module: str
    about: str
    extra: str | None = None


# A command is one script, or one for each of its kinds.
SCRIPTS: dict[str, Script | dict[str, Script]] = {
    "prepare": {
        "shapes": Script("unified_recipes.prepare_shapes", "scenes of coloured shapes with exact ground truth"),
        "shapes-chat": Script("unified_recipes.prepare_shapes_chat", "questions, answers and drawings of such scenes"),
        "openmoji": Script("unified_recipes.prepare_openmoji", "emoji with captions", "data"),
        "shapes-lists": Script(
            "unified_recipes.prepare_shapes_lists", "lists of shapes in words, said in order, asked about"
        ),
        "imagenet": Script("unified_recipes.prepare_imagenet", "ImageNet's classes as codes of ten crops"),
        "smollm2": Script("unified_recipes.prepare_smollm2", "SmolLM2-135M as a transformers folder", "smollm2"),
        "efficientnet": Script(
            "unified_recipes.prepare_efficientnet",
            "EfficientNet-Lite0 as a transformers folder, to read images by",
            "eval",
        ),
        "pairs": Script(
            "unified_recipes.prepare_pairs", "pairs of a pipeline's own images, ranked by a reward", "eval"
        ),
    },
    "tokenizer": {
        "image": Script("unified_recipes.train_tokenizer", "train an image tokenizer"),
        "text": Script("unified_recipes.train_text_tokenizer", "train a text tokenizer"),
        "evaluate": Script("unified_evaluation.evaluate_tokenizer", "measure image tokenizers side by side", "eval"),
    },
    "encode": Script("unified_recipes.encode_images", "Encode images once, so that training reads codes."),
    "train": Script("unified_recipes.train", "Train a model or an adapter."),
    "grpo": Script("unified_recipes.grpo", "Train an adapter with rewards of sampled images."),
    "evaluate": Script("unified_evaluation.evaluate", "Generate images, measure them and report.", "eval"),
    "evaluate-text": Script(
        "unified_evaluation.evaluate_text", "Ask for captions and answers, measure them and report.", "eval"
    ),
    "compare": Script("unified_evaluation.compare", "Compare two evaluations in pairs of images.", "eval"),
    "convert": Script("unified_recipes.convert_checkpoint", "Turn published checkpoints into folders of this library."),
}
PACKAGES = ("unified", "unified_tokenizers", "unified_eval", "unified_recipes", "unified_evaluation")


def about(command: str) -> str:
    """What a command does, in one line."""
    entry = SCRIPTS[command]
    return entry.about if isinstance(entry, Script) else "; ".join(f"{kind}: {s.about}" for kind, s in entry.items())


def run_script(command: str, argv: Sequence[str]) -> None:
    """Run a command of :data:`SCRIPTS` as its script runs; what a user got wrong ends it as there, with exit code 2."""
    from unified.errors import explain_errors

    entry, rest, name = SCRIPTS[command], list(argv), f"unified {command}"
    if isinstance(entry, dict):
        kind = rest.pop(0) if rest else ""
        if kind not in entry:
            lines = [
                f"usage: {name} {{{','.join(entry)}}} ...",
                "",
                *(f"  {k:<12} {s.about}" for k, s in entry.items()),
            ]
            if kind in ("-h", "--help"):
                print("\n".join(lines))
                return
            print(lines[0], file=sys.stderr)
            print(f"{name}: {kind!r} is unknown; use one of {', '.join(entry)}.", file=sys.stderr)
            sys.exit(2)
        script, name = entry[kind], f"{name} {kind}"
    else:
        script = entry

    def run() -> None:
        try:
            module = import_module(script.module)
        except ModuleNotFoundError as error:
            package = (error.name or "").partition(".")[0]
            if script.extra is None or package in PACKAGES:
                raise
            raise ValueError(
                f"the package {package!r} is missing; install the extra: pip install 'unified-npp[{script.extra}]'."
            ) from error
        module.main(rest)

    before = sys.argv
    sys.argv = [name, *rest]  # what usage lines, errors and reports show
    try:
        explain_errors(run)
    finally:
        sys.argv = before

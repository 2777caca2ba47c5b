"""Model cards: where weights come from, what they were trained on, under which terms."""

import shutil
import subprocess
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

_ABOUT = {
    "pipeline": "A language model that generates images, with its tokenizers.",
    "lora": "A LoRA adapter for a language model that generates images.",
    "base": "A language model with image tables that are not trained yet; the adapter beside it is loaded into it.",
}
_LOAD = """```python
from unified import UnifiedPipeline

pipe = UnifiedPipeline.from_pretrained("{pipeline}")
{adapter}image = pipe({wanted}).images[0]
```"""
# A part that weights were made from: what it is, and its `license` and `attribution`, None where nothing states them.
Origin = tuple[str, Mapping[str, Any]]


def model_card(
    part: str,
    folder: Path,
    base: str,
    origins: Sequence[Origin],
    log: Sequence[Mapping[str, Any]],
    image_tokenizer_fingerprint: str,
    settings: str,
    classes: int | None = None,
) -> str:
    """Text of a ``README.md`` with front matter; terms that nothing states are said to be unknown.

    Args:
        part: ``pipeline``, ``lora`` or ``base``.
        folder: where the part is saved, in the folder of its run.
        base: pipeline that an adapter is loaded into.
        origins: what the weights were made from.
        log: records of the run's log, whose last values are shown; empty for none.
        image_tokenizer_fingerprint: of the tokenizer whose codes the model was trained on.
        settings: settings of the run as YAML.
        classes: of a class-conditional model.
    """
    adapter = f'pipe.load_lora_weights("{folder}")\n' if part == "lora" else ""
    sections = {
        "How to load it": _LOAD.format(
            pipeline=base if adapter else folder,
            adapter=adapter,
            wanted='"a caption"' if classes is None else "class_labels=0, guidance_scale=2.0",
        ),
        "What it was made from": "\n".join(
            f"- {what}. Licence: {_stated(terms['license'], 'unknown')}. "
            f"Attribution: {_stated(terms['attribution'], 'none stated')}"
            for what, terms in origins
        ),
        "Last metrics of the log": _last_metrics(log) if log else "",
        "Image tokenizer": f"Fingerprint `{image_tokenizer_fingerprint}`. Codes of another one mean other images.",
        "Code": f"Written by unified, {code_version()}.",
        "Settings": f"```yaml\n{settings}```",
    }
    body = "\n\n".join(f"## {heading}\n\n{text}" for heading, text in sections.items() if text)
    licences, attributions = ([terms[name] for _, terms in origins] for name in ("license", "attribution"))
    tags = ["lora"] * (part == "lora") + ["class-conditional"] * (classes is not None)
    front = _front_matter(licences, attributions, tags)
    about = _ABOUT[part] if classes is None else f"{_ABOUT[part]} Its images show one of {classes} classes."
    return str(ModelCard(f"{front}# {folder.parent.name}\n\n{about}\n\n{body}\n"))


def combined_card(base: str | None, adapters: Mapping[str, str | None]) -> str | None:
    """Text of a ``README.md`` for a model with fused adapters, given the text of its card and the texts of theirs.

    Without adapters it is the model's card. A part without a card or a known licence makes the licence ``unknown``.
    """
    if not adapters:
        return base
    parts = {"The model": base, **{f"The adapter {name!r}": text for name, text in adapters.items()}}
    cards = {
        title: ModelCard(text or "---\n{}\n---\nNo card.", ignore_metadata_errors=True) for title, text in parts.items()
    }
    terms = [card.data.to_dict() for card in cards.values()]
    licences = [None if term.get("license") == "unknown" else term.get("license") for term in terms]
    body = "\n\n".join(f"## {title}\n\n{card.text.strip()}" for title, card in cards.items())
    front = _front_matter(licences, [term.get("attribution") for term in terms])
    return f"{front}# A model with fused adapters\n\n{body}\n"


def read_card(folder: Path) -> str | None:
    """Text of a folder's ``README.md``, None without one. Raises ValueError if it is not UTF-8."""
    file = folder / "README.md"
    try:
        return file.read_text(encoding="utf-8") if file.is_file() else None
    except UnicodeDecodeError as error:
        raise ValueError(f"README.md: {str(file)!r} is not UTF-8 ({error}); correct it.") from error


def code_version() -> str:
    """The commit of a checkout, marked ``-dirty`` if files differ from it; else the version of the installed package."""
    root = Path(__file__).resolve().parent.parent
    if (root / ".git").exists() and shutil.which("git"):
        command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        described = subprocess.run(command, capture_output=True, text=True)
        if described.returncode == 0:
            return f"commit {described.stdout.strip()}"
    try:
        return f"version {version('unified-npp')}"
    except PackageNotFoundError:
        return "version unknown"


def _front_matter(licences: Sequence[Any], attributions: Sequence[Any], tags: Sequence[str] = ()) -> str:
    """The terms of all parts together, None where a part states none, as the YAML block in front of a card."""
    stated = [attribution for attribution in attributions if attribution]
    data = ModelCardData(
        license="unknown" if not licences or None in licences else _one_or_all(licences),
        attribution=_one_or_all(stated) if stated else None,
        library_name="unified",
        pipeline_tag="text-to-image",
        tags=["next-patch-prediction", *tags],
    )
    return f"---\n{data.to_yaml()}\n---\n\n"


def _one_or_all(terms: Sequence[Any]) -> Any:
    """One term if all agree, else a list of the different ones."""
    different = list(dict.fromkeys(text for term in terms for text in ([term] if isinstance(term, str) else term)))
    return different[0] if len(different) == 1 else different


def _stated(term: Any, otherwise: str) -> str:
    return otherwise if term is None else term if isinstance(term, str) else ", ".join(term)


def _last_metrics(log: Sequence[Mapping[str, Any]]) -> str:
    last = {name: (value, record["step"]) for record in log for name, value in record.items() if name != "step"}
    shown = {name: f"{value:.5g}" if isinstance(value, float) else value for name, (value, _) in last.items()}
    lines = [f"| {name} | {shown[name]} | {step} |" for name, (_, step) in last.items()]
    return "\n".join(["| metric | value | after step |", "|---|---|---|", *lines])

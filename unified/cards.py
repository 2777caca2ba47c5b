"""Cards of weights that are put together: the terms of all parts stay with them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData


def combined_card(base: str | None, adapters: Mapping[str, str | None]) -> str | None:
    """Text of a ``README.md`` for a model that adapters were fused into, given the texts of its own and of theirs.

    Without adapters it is the model's own. A part without a card or a known licence makes the licence ``unknown``.
    """
    if not adapters:
        return base
    parts = {"The model": base, **{f"The adapter {name!r}": text for name, text in adapters.items()}}
    cards = {
        title: ModelCard(text or "---\n{}\n---\nNo card.", ignore_metadata_errors=True) for title, text in parts.items()
    }
    terms = [card.data.to_dict() for card in cards.values()]
    licences = [None if term.get("license") == "unknown" else term.get("license") for term in terms]
    attributions = [term["attribution"] for term in terms if term.get("attribution")]
    data = ModelCardData(
        license=one_or_all(licences),
        attribution=one_or_all(attributions) if attributions else None,
        library_name="unified",
        pipeline_tag="text-to-image",
        tags=["next-patch-prediction"],
    )
    body = "\n\n".join(f"## {title}\n\n{card.text.strip()}" for title, card in cards.items())
    return f"---\n{data.to_yaml()}\n---\n\n# A model with fused adapters\n\n{body}\n"


def read_card(folder: Path) -> str | None:
    """Text of a folder's ``README.md``, None without one."""
    file = folder / "README.md"
    return file.read_text(encoding="utf-8") if file.is_file() else None


def one_or_all(terms: list[Any]) -> Any:
    """Terms that hold together: one if they agree, a list if not, ``unknown`` if there is none or one is missing."""
    if not terms or None in terms:
        return "unknown"
    different = list(dict.fromkeys(text for term in terms for text in ([term] if isinstance(term, str) else term)))
    return different[0] if len(different) == 1 else different

"""The model card of a run: where its weights come from, what they were trained on, under which terms."""

import json
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from unified.cards import one_or_all
from unified.data.code_cache import CACHE_FILE, is_codes_cache
from unified.data.sources import terms_of
from unified.settings import dump_settings
from unified.training.config import TrainConfig
from unified.training.tracking import read_log

_WHAT = {
    "pipeline": "A language model that generates images, with its image and text tokenizer.",
    "lora": "A LoRA adapter for a language model that generates images.",
    "base": "A language model with image tables that are not trained yet: what the adapter beside it is loaded into.",
}
_LOAD = """```python
from unified import UnifiedPipeline

pipe = UnifiedPipeline.from_pretrained("{pipeline}")
{adapter}image = pipe("a caption").images[0]
```"""


def run_card(config: TrainConfig, part: str, image_tokenizer_fingerprint: str) -> str:
    """Text of a ``README.md`` with front matter; terms that nothing states are said to be unknown.

    Args:
        config: settings of the run, whose ``output_dir`` holds its log and, of images encoded on the way, the codes.
        part: ``pipeline``, ``lora``, or ``base``, which knows neither data nor figures.
        image_tokenizer_fingerprint: of the tokenizer whose codes the model was trained on.
    """
    output = Path(config.output_dir)
    made_from: list[tuple[str, dict[str, Any]]] = []
    if origin := config.model.pipeline or config.model.backbone:
        made_from.append((f"Weights: `{origin}`", terms_of(origin)))
    if part != "base":
        made_from += _data(config)
    licences, attributions = ([terms[name] for _, terms in made_from] for name in ("license", "attribution"))
    data = ModelCardData(
        license=one_or_all(licences),
        attribution=one_or_all([text for text in attributions if text]) if any(attributions) else None,
        library_name="unified",
        pipeline_tag="text-to-image",
        tags=["next-patch-prediction", *(["lora"] if part == "lora" else [])],
    )
    base = config.model.pipeline or str(output / "base")
    parts = {
        "How to load it": _LOAD.format(
            pipeline=base if part == "lora" else output / part,
            adapter=f'pipe.load_lora_weights("{output / part}")\n' if part == "lora" else "",
        ),
        "What it was made from": "\n".join(
            f"- {what}. Licence: {_said(terms['license'], 'unknown')}. Attribution: {_said(terms['attribution'], 'none stated')}"
            for what, terms in made_from
        ),
        "Last metrics of the log": "" if part == "base" else _figures(read_log(output)),
        "Image tokenizer": f"Fingerprint `{image_tokenizer_fingerprint}`. Codes of another one mean other images.",
        "Code": f"Written by unified, {code_version()}.",
        "Settings": f"```yaml\n{dump_settings(config)}```",
    }
    body = "\n\n".join(f"## {heading}\n\n{text}" for heading, text in parts.items() if text)
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n# {output.name}\n\n{_WHAT[part]}\n\n{body}\n"))


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


def _data(config: TrainConfig) -> list[tuple[str, dict[str, Any]]]:
    """What the run was trained on and its terms, source by source."""
    data, output = config.data, Path(config.output_dir)
    if data.train:
        return [_codes("Pictures", data.train, output / "codes", data.train_split, data.max_samples)]
    kinds = {"image": "Pictures", "interleaved": "Texts with images"}
    return [
        (f"Texts: `{source.path}`", terms_of(source.path))
        if source.kind == "text"
        else _codes(kinds[source.kind], source.path, output / f"codes-{number}", source.split)
        for number, source in enumerate(data.sources)
    ]


def _codes(
    what: str, source: str, encoded: Path, split: str, max_samples: int | None = None
) -> tuple[str, dict[str, Any]]:
    """``source`` is a codes cache, or was encoded into ``encoded``."""
    folder = Path(source) if is_codes_cache(source) else encoded
    codes = json.loads((folder / CACHE_FILE).read_text())
    used = min(codes["rows"][split]["used"], max_samples or float("inf"))
    terms = codes if "license" in codes else terms_of(codes["source"])  # a cache of an earlier version says nothing
    return f"{what}: `{codes['source']}`, {used} for training", terms


def _said(term: Any, otherwise: str) -> str:
    return otherwise if term is None else term if isinstance(term, str) else ", ".join(term)


def _figures(log: list[dict[str, Any]]) -> str:
    last = {name: (value, record["step"]) for record in log for name, value in record.items() if name != "step"}
    shown = {name: f"{value:.5g}" if isinstance(value, float) else value for name, (value, _) in last.items()}
    lines = [f"| {name} | {shown[name]} | {step} |" for name, (_, step) in last.items()]
    return "\n".join(["| metric | value | after step |", "|---|---|---|", *lines])

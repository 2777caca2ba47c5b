"""Files of benchmark prompts: GenEval's JSON lines, PartiPrompts' table, or one prompt a line."""

import csv
import json
from pathlib import Path
from typing import Any, NamedTuple

from unified.pipeline.arguments import check_unicode


class Prompt(NamedTuple):
    """One prompt of a benchmark.

    ``tag`` is its task (GenEval) or category (PartiPrompts), else ``prompt``; ``metadata`` is all that its line says.
    """

    text: str
    tag: str
    metadata: dict[str, Any]


def read_prompts(path: str | Path) -> list[Prompt]:
    """Read a prompt file by its suffix: ``.jsonl`` (GenEval), ``.tsv`` (PartiPrompts) or ``.txt`` (a prompt a line).

    Repeated prompts are kept, as the benchmarks count them.

    Raises:
        ValueError: if the file is missing, of another kind or empty, or a line lacks its prompt or tag.

    Source: Ghosh et al. 2023, https://arxiv.org/abs/2310.11513 (``prompts/evaluation_metadata.jsonl``);
    Yu et al. 2022, https://arxiv.org/abs/2206.10789 (``PartiPrompts.tsv``).
    """
    path = Path(path)
    readers = {".jsonl": _geneval, ".tsv": _partiprompts, ".txt": _lines}
    if path.suffix not in readers or not path.is_file():
        raise ValueError(f"prompts: {str(path)!r} is missing or not one of {sorted(readers)}.")
    try:
        prompts = readers[path.suffix](path)
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"prompts: {str(path)!r} cannot be read ({error}); write it in UTF-8.") from error
    if not prompts:
        raise ValueError(f"prompts: {str(path)!r} holds no prompt.")
    return prompts


def _geneval(path: Path) -> list[Prompt]:
    prompts = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"prompts: line {number} of {str(path)!r} is not JSON ({error}).") from error
        missing = [key for key in ("prompt", "tag", "include") if not (isinstance(entry, dict) and entry.get(key))]
        if missing:
            raise ValueError(f"prompts: line {number} of {str(path)!r} lacks {missing}; need prompt, tag and include.")
        for key in ("prompt", "tag"):
            if not isinstance(entry[key], str) or not entry[key].strip():
                raise ValueError(f"prompts: {key} {entry[key]!r} in line {number} of {str(path)!r} is no text.")
        check_unicode(entry["prompt"], f"prompts, line {number} of {str(path)!r}")
        prompts.append(Prompt(entry["prompt"].strip(), entry["tag"], entry))
    return prompts


def _partiprompts(path: Path) -> list[Prompt]:
    with path.open(encoding="utf-8", newline="") as file:
        rows = csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)  # quotation marks belong to the prompts
        if not {"Prompt", "Category"} <= set(rows.fieldnames or []):
            raise ValueError(f"prompts: {str(path)!r} has the columns {rows.fieldnames}; need Prompt and Category.")
        prompts = []
        for number, row in enumerate(rows, 2):
            if not (row["Prompt"] or "").strip() or not row["Category"]:
                raise ValueError(f"prompts: line {number} of {str(path)!r} lacks its prompt or category.")
            prompts.append(Prompt(row["Prompt"].strip(), row["Category"], dict(row)))
    return prompts


def _lines(path: Path) -> list[Prompt]:
    texts = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    return [Prompt(text, "prompt", {"prompt": text}) for text in texts if text]

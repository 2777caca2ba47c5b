"""What the site takes over from the READMEs and from the code, so that nothing is said twice.

A line ``{{ README.md#Your own data }}`` becomes that section without its heading, ``{{ README.md }}`` the whole file, and
``{{ keys unified.training.config:TrainConfig }}`` all keys of a config with defaults and meanings.
"""

import os
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PAGES = {  # files of the repository that are pages of the site
    "README.md": "index.md", "recipes/README.md": "studies.md", "eval/README.md": "metrics.md",
    "tokenizers/README.md": "tokenizers.md", "ARCHITECTURE.md": "architecture.md", "CONTRIBUTING.md": "contributing.md",
}  # fmt: skip
_INCLUDE = re.compile(r"^\{\{ (?P<file>[\w./]+\.md)(?:#(?P<section>.+))? \}\}$", re.M)
_KEYS = re.compile(r"^\{\{ keys (?P<module>[\w.]+):(?P<name>\w+) \}\}$", re.M)
_LINK = re.compile(r"(?P<image>!?)\[(?P<text>[^\]]*)\]\((?P<target>[^)\s]+)\)")
_ROLE = re.compile(r":(?:func|class|meth|mod|data|attr):<code>~?([^<]*)</code>")


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Put in what a page includes."""
    markdown = _INCLUDE.sub(lambda found: included(found["file"], found["section"]), markdown)
    return _KEYS.sub(lambda found: keys(found["module"], found["name"]), markdown)


def on_page_content(html: str, **_: Any) -> str:
    """Roles of docstrings, such as ``:func:`name```, as plain code."""
    return _ROLE.sub(r"<code>\1</code>", html)


def included(file: str, section: str | None) -> str:
    """A file or one of its sections, with links that hold in the site.

    Raises:
        ValueError: if there is no such section.
    """
    text = (ROOT / file).read_text(encoding="utf-8")
    text = text if section is None else section_of(text, section, file)
    return _LINK.sub(lambda found: linked(found, (ROOT / file).parent), text)


def section_of(text: str, title: str, file: str) -> str:
    """What stands below a heading, up to the next one of its level or above."""
    body: list[str] = []
    level, fenced = 0, False
    for line in text.splitlines():
        fenced ^= line.startswith("```")
        heading = None if fenced else re.match(r"(#+) (.*)", line)
        if heading and level and len(heading[1]) <= level:
            break
        if level:
            body.append(line)
        elif heading and heading[2] == title:
            level = len(heading[1])
    if not level:
        raise ValueError(f"section: {title!r} is not in {file!r}.")
    return "\n".join(body).strip() + "\n"


def linked(found: re.Match[str], folder: Path) -> str:
    """A link of an included text: to a page, to an image beside the pages, or, to any other file, its text alone."""
    path, _, anchor = found["target"].partition("#")
    if "://" in path or not path:
        return found[0]
    inside = os.path.relpath(folder / path, ROOT)
    target = PAGES.get(inside) or (inside.removeprefix("docs/") if inside.startswith("docs/") else None)
    if target is None:
        return found["text"]
    return f"{found['image']}[{found['text']}]({target}{'#' + anchor if anchor else ''})"


def keys(module: str, name: str) -> str:
    """All keys of the dataclass of a config, as YAML."""
    from importlib import import_module

    from unified.settings import described_keys

    return "\n".join(["```yaml", *described_keys(getattr(import_module(module), name)), "```"])

"""What the README promises: its snippet runs, its commands and files exist."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_snippet_runs(pipeline, tmp_path, monkeypatch):
    """The first Python block, on a tiny pipeline saved where the quickstart saves its own."""
    snippet = re.search(r"```python\n(.*?)```", README, re.S).group(1)
    pipeline.save_pretrained(tmp_path / "runs/quickstart/pipeline")
    monkeypatch.chdir(tmp_path)
    exec(snippet, {})
    assert (tmp_path / "star.png").is_file()


def test_commands_and_links_exist():
    makefile = (ROOT / "Makefile").read_text()
    for target in ("quickstart", "test"):
        assert f"make {target}" in README and f"\n{target}:" in makefile
    linked = [link for link in re.findall(r"\]\(([^)#]+)\)", README) if "://" not in link]
    assert linked
    assert [link for link in linked if not (ROOT / link).exists()] == []
    named = set(re.findall(r"(?:recipes|eval)/[\w/]+\.(?:py|yaml)", README))
    assert named and [path for path in named if not (ROOT / path).exists()] == []

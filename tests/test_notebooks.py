"""The notebooks run from their first cell to their last; what they claim, they assert."""

import json
from pathlib import Path

import pytest

NOTEBOOKS = sorted((Path(__file__).resolve().parent.parent / "docs" / "notebooks").glob("*.ipynb"))


@pytest.mark.process
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook(notebook, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "__main__"}
    cells = [cell for cell in json.loads(notebook.read_text())["cells"] if cell["cell_type"] == "code"]
    for number, cell in enumerate(cells):
        assert cell["outputs"] == [], "saved without what it printed"
        exec(compile("".join(cell["source"]), f"{notebook.name} cell {number}", "exec"), names)
    assert len(cells) >= 5


def test_there_are_notebooks():
    assert [path.stem for path in NOTEBOOKS] == ["attach_lora", "generate_and_inpaint"]

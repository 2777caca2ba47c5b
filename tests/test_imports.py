"""The layout of the repository: folders that must not shadow packages, imports that point down only."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FLOOR = {"unified_tokenizers": 0, "unified": 1, "unified_eval": 2}
PLACES = {"unified_tokenizers": ROOT / "tokenizers" / "unified_tokenizers", "unified": ROOT / "unified",
          "unified_eval": ROOT / "eval" / "unified_eval"}  # fmt: skip


@pytest.mark.parametrize("how", [["-c", "from transformers import AutoTokenizer; import datasets; print(datasets.__version__)"],
                                 ["-m", "pytest", "--version"]])  # fmt: skip
def test_transformers_imports_from_the_root(how):
    done = subprocess.run([sys.executable, *how], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("folder", ["tokenizers", "eval", "recipes", "tests"])
def test_outer_folders_are_no_packages(folder):
    assert not (ROOT / folder / "__init__.py").exists()


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("package", FLOOR)
def test_imports_point_down(package):
    files = list(PLACES[package].rglob("*.py"))
    assert files
    for file in files:
        above = {name for name in imported(file) if FLOOR.get(name, -1) > FLOOR[package]}
        assert not above, f"{file} imports {above} from a floor above"

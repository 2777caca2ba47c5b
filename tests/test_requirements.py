"""The locks in requirements/ are in step with pyproject.toml and with each other."""

import re
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from itertools import chain
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from test_imports import PACKAGES, files, imported

ROOT = Path(__file__).resolve().parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT = PYPROJECT["project"]
PYTHONS = ["3.11", "3.12", "3.13"]


def lock_text(extra: str) -> str:
    return (ROOT / "requirements" / f"{extra}.txt").read_text(encoding="utf-8")


def locked(extra: str) -> Iterator[tuple[Requirement, list[str]]]:
    """Each requirement of a lock with its hashes."""
    for line in lock_text(extra).replace("\\\n", "").splitlines():
        if line and not line.lstrip().startswith("#"):
            requirement, *hashes = re.split(r"\s+--hash=", line)
            yield Requirement(requirement), hashes


def required(extra: str) -> Iterator[Requirement]:
    """What an extra names in pyproject.toml, extras of extras opened."""
    for requirement in map(Requirement, PROJECT["optional-dependencies"][extra]):
        if requirement.name == PROJECT["name"]:
            for inner in sorted(requirement.extras):
                yield from required(inner)
        else:
            yield requirement


def applies(requirement: Requirement, python: str) -> bool:
    """Whether a requirement is for CPython of this version on Linux."""
    return requirement.marker is None or requirement.marker.evaluate(
        {"python_version": python, "python_full_version": f"{python}.0", "implementation_name": "cpython",
         "platform_python_implementation": "CPython", "sys_platform": "linux", "platform_system": "Linux",
         "platform_machine": "x86_64", "os_name": "posix"}
    )  # fmt: skip


def versions(extra: str, python: str) -> dict[str, str]:
    """Package -> locked version."""
    found: dict[str, str] = {}
    for requirement, _ in locked(extra):
        if applies(requirement, python):
            name = canonicalize_name(requirement.name)
            assert name not in found, f"{name} is locked twice for Python {python}"
            (specifier,) = requirement.specifier
            found[name] = specifier.version
    return found


@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize("extra", ["quickstart", "dev"])
def test_lock_satisfies_pyproject(extra, python):
    found = versions(extra, python)
    direct = map(Requirement, PYPROJECT["build-system"]["requires"] + PROJECT["dependencies"])
    behind = {}
    for requirement in [*direct, *required(extra)]:
        version = found.get(canonicalize_name(requirement.name))
        if applies(requirement, python) and (version is None or version not in requirement.specifier):
            behind[str(requirement)] = version
    assert behind == {}, "the locks are behind pyproject.toml: run `make lock`"


@pytest.mark.parametrize("python", PYTHONS)
def test_quickstart_is_a_part_of_dev(python):
    """Quickstart, demo and tests run on the same versions; the quickstart installs no tools of the tests."""
    quickstart, dev = versions("quickstart", python), versions("dev", python)
    assert quickstart.items() < dev.items()
    assert quickstart.keys() & {"gradio", "mypy", "playwright", "pytest", "ruff", "uv"} == set()


@pytest.mark.parametrize("extra", ["quickstart", "dev"])
def test_every_line_is_pinned_and_hashed(extra):
    for requirement, hashes in locked(extra):
        assert [specifier.operator for specifier in requirement.specifier] == ["=="], requirement
        assert hashes and all(re.fullmatch(r"sha256:[0-9a-f]{64}", digest) for digest in hashes), requirement
    assert "://" not in lock_text(extra)  # no address of an index


def test_locks_are_made_for_the_oldest_python():
    assert PROJECT["requires-python"] == f">={PYTHONS[0]}"
    assert f"--python-version {PYTHONS[0]} " in (ROOT / "Makefile").read_text(encoding="utf-8")


@pytest.mark.process
def test_what_the_packages_import_is_named():
    """A package that came along with another one may be gone with its next version."""
    extras = PROJECT["optional-dependencies"]
    named = {
        canonicalize_name(each.name) for each in map(Requirement, [*PROJECT["dependencies"], *chain(*extras.values())])
    }
    owners, known = packages_distributions(), {*sys.stdlib_module_names, *PACKAGES}
    modules = {module.split(".")[0] for file in files() for module in imported(file)} - known
    assert {"torch", "httpx2"} <= modules
    assert [each for each in sorted(modules) if not named & {canonicalize_name(one) for one in owners[each]}] == []

"""What a user can fix is one line and exit code 2; a bug keeps its traceback."""

import subprocess
import sys

import pytest
from conftest import LAUNCH, ROOT
from safetensors import SafetensorError

from unified.errors import explain_errors


@pytest.mark.parametrize(
    "error",
    [
        ValueError("steps: 0 must be\n  at least 1"),
        FileNotFoundError("steps: 0 must be at least 1"),
        FloatingPointError("steps: 0 must be at least 1"),
        SafetensorError("steps: 0 must be at least 1"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_expected_errors_are_one_line(error, monkeypatch, capsys):
    def main():
        raise error

    monkeypatch.setattr(sys, "argv", ["recipes/train.py"])
    with pytest.raises(SystemExit) as exit:
        explain_errors(main)
    assert exit.value.code == 2
    assert capsys.readouterr().err == "train.py: steps: 0 must be at least 1\n"


@pytest.mark.parametrize("bug", [RuntimeError("shapes"), KeyError("name"), TypeError("call")])
def test_bugs_keep_their_traceback(bug):
    def main():
        raise bug

    with pytest.raises(type(bug)):
        explain_errors(main)


def test_ctrl_c_is_no_traceback(capsys):
    def main():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as exit:
        explain_errors(main)
    assert exit.value.code == 130 and capsys.readouterr().err.endswith(": interrupted.\n")


def test_all_recipes_explain_errors():
    scripts = [path.read_text() for path in (ROOT / "recipes").glob("*.py")]
    scripts = [text for text in scripts if "__main__" in text]
    assert len(scripts) >= 10 and all(text.endswith("    explain_errors(main)\n") for text in scripts)


WRONG = """
from unified.errors import explain_errors

def main():
    raise ValueError("steps: 0 must be at least 1")

explain_errors(main)
"""


@pytest.mark.process
@pytest.mark.parametrize("quiet", [True, False])
def test_accelerate_launch_shows_the_line(quiet, tmp_path):
    """The launcher's own traceback and exit code are all that it adds; --quiet leaves the traceback out."""
    launch = [*LAUNCH[:3], "--quiet", *LAUNCH[3:]] if quiet else LAUNCH
    script = tmp_path / "train.py"
    script.write_text(WRONG)
    done = subprocess.run([*launch, str(script)], cwd=ROOT, capture_output=True, text=True)
    lines = [line for line in done.stderr.splitlines() if line.startswith("train.py: ")]
    assert lines == ["train.py: steps: 0 must be at least 1"]
    assert done.stderr.count("Traceback") == (0 if quiet else 1)
    assert done.returncode == 1 and ("exit status 2" in done.stderr) == (not quiet)

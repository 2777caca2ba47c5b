"""The quickstart's bookkeeping: what is done stays done, what changed runs again with all that follows."""

import json
import sys

import pytest

import quickstart


@pytest.fixture
def steps(tmp_path, monkeypatch):
    """Three steps that append their name to a file; returns a function that runs the quickstart and reads the file."""
    log = tmp_path / "log.txt"
    config = tmp_path / "settings.yaml"
    config.write_text("steps: 1")

    def command(name):
        return [sys.executable, "-c", f"open({str(log)!r}, 'a').write({name!r})", str(config)]

    monkeypatch.setattr(quickstart, "ROOT", tmp_path)
    monkeypatch.setattr(quickstart, "STEPS", {name: command(name) for name in "abc"})

    def run(*arguments):
        log.write_text("")
        monkeypatch.setattr(sys, "argv", ["quickstart.py", *arguments])
        quickstart.main()
        return log.read_text()

    run.command, run.config = command, config
    return run


def test_second_run_does_nothing(steps, tmp_path):
    assert steps() == "abc"
    assert steps() == ""
    records = json.loads((tmp_path / quickstart.OUT / "steps.json").read_text())
    assert list(records) == ["a", "b", "c"]
    assert all(record["seconds"] > 0 for record in records.values())


def test_fresh_starts_anew(steps):
    steps()
    assert steps("--fresh") == "abc"


def test_changed_command_runs_again_with_what_follows(steps, monkeypatch):
    steps()
    monkeypatch.setitem(quickstart.STEPS, "b", steps.command("B"))
    assert steps() == "Bc"


def test_changed_config_runs_again(steps):
    steps()
    steps.config.write_text("steps: 2")
    assert steps() == "abc"


def test_what_a_changed_training_left_is_removed(steps, tmp_path, monkeypatch):
    """Training refuses a folder with checkpoints, or codes, of another run."""
    monkeypatch.setattr(quickstart, "STEPS", {name: steps.command(name) for name in ("model", "lora")})
    steps()
    out = tmp_path / quickstart.OUT
    left = [out / "model" / "checkpoints" / "step-00000001", out / "lora_run" / "codes"]
    for folder in left:
        folder.mkdir(parents=True)
    assert steps() == "" and all(folder.is_dir() for folder in left)
    steps.config.write_text("steps: 2")
    assert steps() == "modellora" and not any(folder.exists() for folder in left)


def test_failed_step_stops_and_is_continued(steps, monkeypatch):
    monkeypatch.setitem(quickstart.STEPS, "b", [sys.executable, "-c", "raise SystemExit(3)"])
    with pytest.raises(SystemExit, match="exit code 3; run again to continue"):
        steps()
    monkeypatch.setitem(quickstart.STEPS, "b", steps.command("b"))
    assert steps() == "bc"


def test_memory_counts_children():
    import subprocess

    import psutil

    hog = "import time; x = bytearray(200_000_000); print('ready', flush=True); time.sleep(20)"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {hog!r}])"
    with subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"ready\n"
        assert 0.2 < quickstart.tree_memory_gb(psutil.Process(process.pid)) < 0.4
        for child in psutil.Process(process.pid).children():
            child.kill()

"""The speedrun: its row, its target, and that it trains what the quickstart prepares."""

import json
import subprocess
from pathlib import Path

import pytest

import quickstart
import speedrun
from unified.training.config import load_config


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A speedrun that neither prepares nor trains, with the loss that is given."""
    asked = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(speedrun, "ROOT", tmp_path)
    monkeypatch.setattr(subprocess, "run", lambda command, **_: asked.append(command))
    monkeypatch.setattr(speedrun, "run", lambda command: asked.append(command) or (90.0, 1.5))

    def start(loss):
        figures = {
            "seconds": 90.0,
            "flops": 4.4e13,
            "nats_per_code": loss,
            "captions_drawn_exactly": 0.734,
            "commit": "a1b2",
        }
        monkeypatch.setattr(speedrun, "measure", lambda seconds: figures)
        speedrun.main([])
        return asked

    return start


def test_a_run_that_counts_is_a_row(run, capsys, tmp_path):
    preparation, training = run(0.0945)
    assert preparation[-2:] == ["--until", "codes"]
    assert training[-1] == speedrun.CONFIG and f"batch_size={16 // quickstart.PROCESSES}" in training
    assert "| 1.5 | 4.4e+13 | 0.0945 | 0.73 | a1b2 |" in capsys.readouterr().out
    assert json.loads((tmp_path / "runs/speedrun/result.json").read_text())["peak_memory_gb"] == 1.5


def test_a_run_that_misses_the_target_ends_with_an_error(run):
    with pytest.raises(ValueError, match=r"0\.1010 nats a code; a run counts at 0\.1 or less"):
        run(0.101)


def test_its_config_trains_on_what_the_quickstart_prepares():
    config = load_config(str(Path(__file__).parent.parent / speedrun.CONFIG), [])
    assert Path(config.output_dir) == speedrun.OUT
    assert str(config.data.train) in quickstart.STEPS["codes"]
    assert str(config.model.image_tokenizer) in quickstart.STEPS["codes"]
    assert str(config.model.text_tokenizer) in quickstart.STEPS["text_tokenizer"]

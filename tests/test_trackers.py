"""Trackers get the settings, the metrics and the samples of a run; unknown and missing ones are named."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from unified.training import tracking
from unified.training.config import load_config
from unified.training.loop import train
from unified.training.tracking import RunLog, check_trackers


@pytest.mark.process
def test_tensorboard_continues_where_the_checkpoint_was(config_file, tmp_path):
    """Steps 11 and 12 are written twice and shown once; the folder bears the project's name."""
    options = [f"output_dir={tmp_path}", "track_with=[tensorboard]", "project=pictures", "checkpoint_every=10"]
    train(load_config(config_file, options))
    (tmp_path / "checkpoints" / "step-00000012").rename(tmp_path / "removed")
    train(load_config(config_file, [*options, "resume=latest"]))
    events = EventAccumulator(str(tmp_path / "pictures")).Reload()
    assert [event.step for event in events.Scalars("image_loss")] == list(range(1, 13))
    (settings,) = {
        path.read_text() for path in (tmp_path / "pictures").rglob("hparams.yml") if "resume: None" in path.read_text()
    }
    assert "optimizer.learning_rate: 0.01\n" in settings and "schedule.patch_sizes: '[4, 2, 1]'\n" in settings


def test_missing_and_unknown_trackers_are_named(config_file, tmp_path, monkeypatch):
    monkeypatch.setattr(tracking, "get_available_trackers", lambda: ["tensorboard"])
    check_trackers(["tensorboard"])
    with pytest.raises(ValueError, match="track_with: 'wandb' is not installed; `pip install wandb`"):
        train(load_config(config_file, [f"output_dir={tmp_path}/run", "track_with=[tensorboard,wandb]"]))
    with pytest.raises(ValueError, match="track_with: 'wendb' is unknown; use some of"):
        check_trackers(["wendb"])
    assert not (tmp_path / "run").exists()


def test_sample_sheets_reach_the_trackers_that_take_images(tmp_path, monkeypatch):
    calls = []

    class Tracker(SimpleNamespace):
        def log_images(self, values, step):
            calls.append((self.name, step, np.asarray(values["samples"][0])))

        def log(self, values, step):
            calls.append((self.name, step, values["samples"]))

    monkeypatch.setitem(sys.modules, "trackio", SimpleNamespace(Image=np.asarray))
    trackers = [Tracker(name=name) for name in ("wandb", "trackio", "mlflow")]
    log = RunLog(SimpleNamespace(is_main_process=True, trackers=trackers), tmp_path, 0)
    image = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    log._track(Image.fromarray(image), 7)
    assert [call[:2] for call in calls] == [("wandb", 7), ("trackio", 7)]
    assert all(np.array_equal(call[2], image) for call in calls)

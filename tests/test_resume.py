"""Training that survives: kills, full disks, changed settings, gradients that explode."""

import errno
import os
import shutil
import signal
import subprocess
import time

import pytest
import torch
from accelerate import Accelerator
from conftest import LAUNCH, ROOT
from safetensors.torch import load_file

from unified.training.checkpoint import list_checkpoints
from unified.training.config import load_config
from unified.training.loop import train
from unified.training.tracking import read_log


def without_time(log):
    return [{name: value for name, value in record.items() if name != "images_per_second"} for record in log]


def weights_of(output):
    adapter = output / "lora" / "adapter_model.safetensors"
    return adapter if adapter.is_file() else output / "pipeline" / "model" / "model.safetensors"


def assert_same_run(ours, theirs):
    """Same log and same weights, bitwise."""
    assert without_time(read_log(ours)) == without_time(read_log(theirs))
    a, b = (load_file(weights_of(folder)) for folder in (ours, theirs))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_resumed_run_equals_uninterrupted(finished, config_file, tmp_path):
    """Stop after the checkpoint of step 10 (mid-epoch, in the last stage), resume."""
    train(load_config(config_file, [f"output_dir={tmp_path}"]))
    shutil.rmtree(tmp_path / "checkpoints" / "step-00000012")
    train(load_config(config_file, [f"output_dir={tmp_path}", "resume=latest"]))
    assert_same_run(tmp_path, finished)


LORA = ["model.architecture=null", "optimizer.ema_decay=null", "lora.rank=4", "lora.dropout=0.3"]


@pytest.mark.parametrize(
    "options",
    [["model.architecture.attention_dropout=0.3"], ["optimizer.name=muon"], LORA],
    ids=["dropout", "muon", "lora"],
)
def test_resumed_run_of_every_kind_equals_uninterrupted(options, finished, config_file, tmp_path):
    """Dropout draws from the global random stream, so that one has to continue too."""
    if options is LORA:
        options = [*options, f"model.pipeline={finished}/pipeline"]
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    train(load_config(config_file, [f"output_dir={whole}", *options]))
    shutil.copytree(whole, resumed, ignore=shutil.ignore_patterns("step-00000012", "pipeline", "lora"))
    train(load_config(config_file, [f"output_dir={resumed}", "resume=latest", *options]))
    assert_same_run(resumed, whole)


def test_killed_run_continues(finished, config_file, tmp_path):
    """kill -9 in the middle of a step, a checkpoint at every step, resume in a new process."""
    options = [
        "checkpoint_every=1",
        "sample.every=6",
        "sample.prompts=[red apple,blue car]",
        "track_with=[tensorboard]",
    ]
    command = [
        *LAUNCH,
        str(ROOT / "recipes/train.py"),
        "--config",
        str(config_file),
        f"output_dir={tmp_path}",
        *options,
    ]
    child = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=ROOT, start_new_session=True
    )
    deadline = time.monotonic() + 120
    while len(read_log(tmp_path)) < 5 and time.monotonic() < deadline and child.poll() is None:
        time.sleep(0.01)
    os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    assert not (tmp_path / "pipeline").exists()
    assert list_checkpoints(tmp_path / "checkpoints")
    done = subprocess.run([*command, "resume=latest"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    assert_same_run(tmp_path, finished)


def test_full_disk_leaves_the_last_checkpoint(finished, config_file, tmp_path, monkeypatch):
    save_state = Accelerator.save_state

    def full(self, folder, *args, **kwargs):
        save_state(self, folder, *args, **kwargs)
        if "step-00000010" in folder:
            raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Accelerator, "save_state", full)
        with pytest.raises(OSError, match="No space left"):
            train(load_config(config_file, [f"output_dir={tmp_path}"]))
    assert [path.name for path in list_checkpoints(tmp_path / "checkpoints")] == ["step-00000005"]
    train(load_config(config_file, [f"output_dir={tmp_path}", "resume=latest"]))
    assert_same_run(tmp_path, finished)


def test_changed_settings_are_shown_and_refused(config_file, tmp_path):
    train(load_config(config_file, [f"output_dir={tmp_path}"]))
    changed = [f"output_dir={tmp_path}", "resume=latest", "optimizer.learning_rate=0.5", "keep_checkpoints=7"]
    with pytest.raises(ValueError) as error:
        train(load_config(config_file, changed))
    assert "-  learning_rate: 0.01\n+  learning_rate: 0.5" in str(error.value)
    assert "keep_checkpoints" not in str(error.value) and "allow_changes=true" in str(error.value)
    train(load_config(config_file, [*changed, "allow_changes=true"]))


@pytest.mark.parametrize(("value", "limit"), [(float("nan"), None), (1e6, 1e3)])
def test_bad_gradients_stop_the_run_and_keep_the_batch(config_file, tmp_path, monkeypatch, value, limit):
    clip = Accelerator.clip_grad_norm_
    calls = []

    def poisoned(self, parameters, *args, **kwargs):
        parameters = list(parameters)
        calls.append(1)
        if len(calls) == 3:
            parameters[0].grad[0, 0] = value
        return clip(self, parameters, *args, **kwargs)

    monkeypatch.setattr(Accelerator, "clip_grad_norm_", poisoned)
    limits = [] if limit is None else [f"optimizer.gradient_limit={limit}"]
    with pytest.raises(
        FloatingPointError, match=r"gradients: their norm is (nan|1000000.0) at step 2; the batch is kept"
    ):
        train(load_config(config_file, [f"output_dir={tmp_path}", *limits]))
    batch = load_file(tmp_path / "failed-step-00000002-process-0.safetensors")
    assert batch["input_ids"].shape[0] == 4 and set(batch) == {"input_ids", "labels", "attention_mask", "image_grids"}
    assert [r["step"] for r in read_log(tmp_path)] == [1, 2]  # nothing of the bad step was learned or logged


def test_resume_without_checkpoint_is_an_error(config_file, tmp_path):
    with pytest.raises(ValueError, match="resume: no checkpoint in"):
        train(load_config(config_file, [f"output_dir={tmp_path}", "resume=latest"]))
    with pytest.raises(ValueError, match="is not a checkpoint folder"):
        train(load_config(config_file, [f"output_dir={tmp_path}", f"resume={tmp_path}/nowhere"]))

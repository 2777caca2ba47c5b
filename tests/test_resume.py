"""Training that survives: kills, full disks, changed settings, gradients that explode."""

import contextlib
import errno
import json
import os
import shutil
import signal
import subprocess
import threading
import time
from concurrent import futures
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from conftest import LAUNCH, ROOT, tiny_model
from forking import python
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from unified.data.batches import make_batch
from unified.data.code_cache import encode_source
from unified.data.crops import Views
from unified.sequence import ImageSegment, TextSegment, build_sequence
from unified.training import checkpoint, loop
from unified.training.background import Background
from unified.training.checkpoint import list_checkpoints, save_checkpoint, start_checkpoint
from unified.training.config import load_config
from unified.training.loop import train
from unified.training.state import write_state
from unified.training.step import check_gradients, train_step
from unified.training.tracking import LossMeter, read_log


def without_time(log):
    return [{k: v for k, v in record.items() if not k.endswith("_per_second") and k != "mfu"} for record in log]


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
    """Dropout uses the global random stream, so that one has to continue too."""
    if options is LORA:
        options = [*options, f"model.pipeline={finished}/pipeline"]
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    train(load_config(config_file, [f"output_dir={whole}", *options]))
    shutil.copytree(whole, resumed, ignore=shutil.ignore_patterns("step-00000012", "pipeline", "lora"))
    train(load_config(config_file, [f"output_dir={resumed}", "resume=latest", *options]))
    assert_same_run(resumed, whole)
    kept = resumed / "checkpoints" / "step-00000012" / "trainable.safetensors"
    if "lora.rank=4" in options:  # the adapter, without the weights that it leaves alone
        assert kept.is_file() and all("lora_" in name for name in load_file(kept))
        assert not kept.with_name("model.safetensors").exists()


@pytest.mark.process
def test_killed_run_continues(finished, config_file, tmp_path):
    """Launched as a user launches it: kill -9 in the middle of a step, a checkpoint at every step, resume in a new process."""
    options = [
        "checkpoint_every=1",
        "sample.every=6",
        "sample.prompts=[red apple,blue car]",
        "track_with=[tensorboard]",
    ]
    command = ["recipes/train.py", "--config", str(config_file), f"output_dir={tmp_path}", *options]
    child = subprocess.Popen(
        [*LAUNCH, *command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=ROOT, start_new_session=True
    )
    deadline = time.monotonic() + 300
    while len(read_log(tmp_path)) < 5 and time.monotonic() < deadline and child.poll() is None:
        time.sleep(0.01)
    os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    assert not (tmp_path / "pipeline").exists()
    assert list_checkpoints(tmp_path / "checkpoints")
    done = python(*command, "resume=latest")
    assert done.returncode == 0, done.stderr[-3000:]
    assert_same_run(tmp_path, finished)


KILLED_AFTER = """
import os, shutil, signal, sys
from pathlib import Path
from unified.training import checkpoint
from unified.training.config import load_config
from unified.training.loop import train

point, config, output, *options = sys.argv[1:]
write_state, rmtree, rename = checkpoint.write_state, shutil.rmtree, Path.rename

def killed():
    os.kill(os.getpid(), signal.SIGKILL)

def saved_half(accelerator, folder, *rest):
    write_state(accelerator, folder, *rest)
    if "step-00000010" in folder.name:
        os.unlink(folder / "model.safetensors")
        killed()

def not_renamed(path, target):
    if target.name == "step-00000010":
        killed()
    return rename(path, target)

def removed_half(folder, **options):
    if ".old-" in folder.name:  # the checkpoint of step 12 pushes out that of step 5
        os.unlink(folder / "model.safetensors")
        killed()
    rmtree(folder, **options)

if point == "save":
    checkpoint.write_state = saved_half
elif point == "rename":
    Path.rename = not_renamed
else:
    shutil.rmtree = removed_half
train(load_config(config, [f"output_dir={output}", *options]))
"""
BESIDE = "asynchronous_checkpoints=true"


@pytest.mark.process
@pytest.mark.parametrize(
    ("point", "kept", "options"),
    [
        ("save", [5], []),
        ("rename", [5], []),
        ("remove", [10, 12], []),
        ("save", [5], [BESIDE]),
        ("rename", [5], [BESIDE]),
    ],
)
def test_kill_while_checkpoints_are_written(finished, config_file, tmp_path, point, kept, options):
    """kill -9 with files half written, not renamed or half removed: every checkpoint is whole; the rest is removed."""
    (tmp_path / "killed.py").write_text(KILLED_AFTER)
    done = python(tmp_path / "killed.py", point, config_file, tmp_path, *options)
    assert done.returncode == -signal.SIGKILL, done.stderr
    folder = tmp_path / "checkpoints"
    whole = [f"step-{step:08d}" for step in kept]
    assert [path.name for path in list_checkpoints(folder)] == whole and len(list(folder.iterdir())) == len(kept) + 1
    train(load_config(config_file, [f"output_dir={tmp_path}", "resume=latest"]))
    assert_same_run(tmp_path, finished)
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000010", "step-00000012"]


class Trap:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_checkpoints_hold_no_pickle_and_open_none(finished, config_file, tmp_path):
    """Files as earlier versions wrote them run code when they are opened; nothing opens them."""
    train(load_config(config_file, [f"output_dir={tmp_path}"]))
    folder = tmp_path / "checkpoints" / "step-00000010"
    assert sorted(path.name for path in folder.iterdir()) == [
        "average.safetensors", "model.safetensors", "optimizer.safetensors", "random-0.safetensors", "settings.yaml",
        "trainer_state.json",
    ]  # fmt: skip
    shutil.rmtree(tmp_path / "checkpoints" / "step-00000012")
    for name in ("custom_checkpoint_0.pkl", "random_states_0.pkl", "optimizer.bin", "scheduler.bin"):
        torch.save(Trap(tmp_path / "sprung"), folder / name)
    with pytest.raises(FileExistsError):  # the trap works
        for _ in range(2):
            torch.load(folder / "optimizer.bin", weights_only=False)
    (tmp_path / "sprung").rmdir()
    train(load_config(config_file, [f"output_dir={tmp_path}", "resume=latest"]))
    assert not (tmp_path / "sprung").exists()
    assert_same_run(tmp_path, finished)


@pytest.mark.parametrize(
    ("name", "length", "message"),
    [
        ("random-0.safetensors", 100, r"random-0.safetensors has 100 of \d+ bytes"),
        ("random-0.safetensors", None, "random-0.safetensors is missing"),
        ("model.safetensors", 1000, r"model.safetensors has 1000 of \d+ bytes"),
        ("settings.yaml", 0, r"settings.yaml has 0 of \d+ bytes"),
        ("trainer_state.json", 9, r"trainer_state.json is missing, cut or of an earlier version \(.*\)"),
        ("trainer_state.json", None, r"trainer_state.json is missing, cut or of an earlier version \(.*\)"),
    ],
)
def test_damaged_checkpoint_names_the_one_before(finished, tmp_path, name, length, message):
    folder = tmp_path / "checkpoints"
    shutil.copytree(finished / "checkpoints", folder)
    damaged = folder / "step-00000012" / name
    os.truncate(damaged, length) if length is not None else damaged.unlink()
    before = f"resume={folder}/step-00000010 goes on from the one before it"
    for resume in ("latest", str(damaged.parent)):
        with pytest.raises(ValueError, match=rf"step-00000012' is damaged: {message}\. {before}"):
            start_checkpoint(resume, folder)
    assert start_checkpoint(f"{folder}/step-00000010", folder) == folder / "step-00000010"
    (folder / "step-00000010" / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"No whole one comes before it"):
        start_checkpoint("latest", folder)


def test_resuming_from_the_one_before_a_damaged_one(finished, config_file, tmp_path):
    train(load_config(config_file, [f"output_dir={tmp_path}"]))
    os.truncate(tmp_path / "checkpoints" / "step-00000012" / "trainer_state.json", 5)
    train(load_config(config_file, [f"output_dir={tmp_path}", f"resume={tmp_path}/checkpoints/step-00000010"]))
    assert_same_run(tmp_path, finished)


@pytest.mark.process
def test_used_folder_is_refused_without_resume(config_file, tmp_path):
    train(load_config(config_file, [f"output_dir={tmp_path}/used"]))
    with pytest.raises(ValueError, match=r"output_dir: .* up to step-00000012; resume=latest goes on with it, another"):
        train(load_config(config_file, [f"output_dir={tmp_path}/used"]))
    shutil.copytree(tmp_path / "used" / "checkpoints" / "step-00000010", tmp_path / "other")
    with pytest.raises(ValueError, match=r"resume: .*other' is none of the checkpoints in"):
        train(load_config(config_file, [f"output_dir={tmp_path}/used", f"resume={tmp_path}/other"]))
    train(load_config(config_file, [f"output_dir={tmp_path}/new", f"resume={tmp_path}/other"]))


def test_going_back_discards_what_came_later(finished, config_file, tmp_path):
    """Resumed at step 5 with 10 and 12 present, stopped after step 7: `latest` is not one of the old ones."""
    folder = tmp_path / "checkpoints"
    every = [f"output_dir={tmp_path}", "checkpoint_every=1", "keep_checkpoints=12"]
    train(load_config(config_file, every))
    (folder / ".partial-step-00000013").mkdir()
    (folder / ".old-step-00000001").mkdir()
    stop = KeyError("stop")

    def stopped(accelerator, target, step, *rest):
        if step == 8:
            raise stop
        save_checkpoint(accelerator, target, step, *rest)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyError):
        patch.setattr(loop, "save_checkpoint", stopped)
        train(load_config(config_file, [*every, f"resume={folder}/step-00000005"]))
    assert sorted(path.name for path in folder.iterdir()) == [f"step-{step:08d}" for step in range(1, 8)]
    assert [record["step"] for record in read_log(tmp_path)][-1] == 8
    train(load_config(config_file, [*every, "resume=latest"]))
    assert_same_run(tmp_path, finished)


def test_checkpoints_beside_the_training_hold_the_step_they_name(finished, config_file, tmp_path, monkeypatch):
    """The file of step 5 is written after two more steps, and is that of a run that waits."""
    train(load_config(config_file, [f"output_dir={tmp_path}/at_once", "keep_checkpoints=9"]))
    steps, held = [], threading.Event()
    training_step = loop.train_step

    def step(*given):
        steps.append(len(steps))
        if len(steps) == 8:
            held.set()
        return training_step(*given)

    def late(*given):
        assert held.wait(60)
        written.append(len(steps))
        write_state(*given)

    written = []
    monkeypatch.setattr(loop, "train_step", step)
    monkeypatch.setattr(checkpoint, "write_state", late)
    train(load_config(config_file, [f"output_dir={tmp_path}/beside", "keep_checkpoints=9", BESIDE]))
    assert written[0] == 8 and len(written) == 3
    for folder in list_checkpoints(tmp_path / "at_once" / "checkpoints"):
        files = sorted(file.name for file in folder.iterdir())
        other = tmp_path / "beside" / "checkpoints" / folder.name
        assert files == sorted(file.name for file in other.iterdir())
        for name in files:
            if name.endswith(".safetensors"):
                a, b = load_file(folder / name), load_file(other / name)
                assert a.keys() == b.keys() and all(torch.equal(a[each], b[each]) for each in a)
    shutil.rmtree(tmp_path / "beside" / "checkpoints" / "step-00000012")
    train(load_config(config_file, [f"output_dir={tmp_path}/beside", "resume=latest"]))  # the setting is free to change
    assert_same_run(tmp_path / "beside", finished)


@pytest.mark.parametrize("step", [5, 12])
def test_a_failing_write_beside_the_training_is_reported(config_file, tmp_path, monkeypatch, step):
    """At a step after it, and at the end; the checkpoints before stay."""
    failed = threading.Event()
    check = Background.check

    def full(accelerator, folder, *rest):
        if folder.name.endswith(f"step-{step:08d}"):
            failed.set()
            raise OSError(errno.ENOSPC, "No space left on device")
        write_state(accelerator, folder, *rest)

    def checked(background):
        if failed.is_set():
            futures.wait([background._running])
        check(background)

    monkeypatch.setattr(checkpoint, "write_state", full)
    monkeypatch.setattr(Background, "check", checked)
    with pytest.raises(OSError, match="No space left"):
        train(load_config(config_file, [f"output_dir={tmp_path}", BESIDE]))
    assert [path.name for path in list_checkpoints(tmp_path / "checkpoints")] == (
        [] if step == 5 else ["step-00000005", "step-00000010"]
    )
    assert read_log(tmp_path)[-1]["step"] < 10 or step == 12
    assert not (tmp_path / "pipeline").exists()


def test_torn_log_line_is_dropped(finished, config_file, tmp_path):
    train(load_config(config_file, [f"output_dir={tmp_path}"]))
    shutil.rmtree(tmp_path / "checkpoints" / "step-00000012")
    log = tmp_path / "log.jsonl"
    log.write_text(log.read_text()[:-9])
    train(load_config(config_file, [f"output_dir={tmp_path}", "resume=latest"]))
    assert_same_run(tmp_path, finished)


def test_full_disk_leaves_the_last_checkpoint(finished, config_file, tmp_path, monkeypatch):
    def full(accelerator, folder, *rest):
        if "step-00000010" in folder.name:
            (folder / "model.safetensors").write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        write_state(accelerator, folder, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write_state", full)
        with pytest.raises(OSError, match="No space left"):
            train(load_config(config_file, [f"output_dir={tmp_path}"]))
    assert [path.name for path in list_checkpoints(tmp_path / "checkpoints")] == ["step-00000005"]
    train(load_config(config_file, [f"output_dir={tmp_path}", "resume=latest"]))
    assert_same_run(tmp_path, finished)


@pytest.mark.process
def test_changed_settings_are_shown_and_refused(config_file, tmp_path):
    train(load_config(config_file, [f"output_dir={tmp_path}"]))
    changed = [f"output_dir={tmp_path}", "resume=latest", "optimizer.learning_rate=0.5", "keep_checkpoints=7"]
    with pytest.raises(ValueError) as error:
        train(load_config(config_file, changed))
    assert "the settings differ" in str(error.value) and "allow_changes=true" in str(error.value)
    assert "(optimizer.learning_rate: 0.01 then, 0.5 now)" in str(error.value)  # and nothing else
    train(load_config(config_file, [*changed, "allow_changes=true"]))


def test_changed_inputs_are_shown_and_refused(config_file, finished, parts, image_tokenizer, picture_source, tmp_path):
    """Other rows, another number of processes, another base below an adapter; the settings are the same every time."""
    codes, pipeline = tmp_path / "codes", tmp_path / "pipeline"
    shutil.copytree(parts / "codes", codes)
    shutil.copytree(finished / "pipeline", pipeline)
    options = [f"output_dir={tmp_path}/run", f"data.train={codes}", f"model.pipeline={pipeline}", *LORA]
    train(load_config(config_file, options))
    state = tmp_path / "run" / "checkpoints" / "step-00000012" / "trainer_state.json"
    whole = json.loads(state.read_text())
    rows, frozen = whole["inputs"]["train"], whole["inputs"]["frozen_weights"]
    train(load_config(config_file, [*options, "resume=latest"]))

    state.write_text(json.dumps({**whole, "inputs": {**whole["inputs"], "num_processes": 2}}))
    with pytest.raises(ValueError, match=r"the inputs differ .* \(num_processes: 2 then, 1 now\)"):
        train(load_config(config_file, [*options, "resume=latest"]))
    state.write_text(json.dumps(whole))
    shutil.rmtree(codes)
    encode_source(image_tokenizer, picture_source, codes, image_size=16, views=Views(((16, 16),), flips=True))
    weights = pipeline / "model" / "model.safetensors"
    changed = {name: value * 1.001 if "norm" in name else value for name, value in load_file(weights).items()}
    save_file(changed, weights, {"format": "pt"})
    with pytest.raises(ValueError, match="the inputs differ") as error:
        train(load_config(config_file, [*options, "resume=latest"]))
    assert f"train: {rows} then, [24, " in str(error.value) and f"frozen_weights: {frozen!r} then, " in str(error.value)
    train(load_config(config_file, [*options, "resume=latest", "allow_changes=true"]))


@pytest.mark.parametrize(("value", "limit"), [(float("nan"), None), (1e6, 1e3)])
def test_bad_gradients_stop_the_run_and_keep_the_batch(config_file, tmp_path, monkeypatch, value, limit):
    clip = Accelerator.clip_grad_norm_
    calls, rates = [], []

    def poisoned(self, parameters, *args, **kwargs):
        parameters = list(parameters)
        calls.append(1)
        rates.append(self._optimizers[0].param_groups[0]["lr"])
        if len(calls) == 3:
            parameters[0].grad[0, 0] = value
        return clip(self, parameters, *args, **kwargs)

    monkeypatch.setattr(Accelerator, "clip_grad_norm_", poisoned)
    limits = [] if limit is None else [f"optimizer.gradient_limit={limit}"]
    small = ["batch_size=2", "gradient_accumulation_steps=2"]
    with pytest.raises(
        FloatingPointError, match=rf"gradients: their norm is ({value}) at step 2; the batches are kept"
    ):
        train(load_config(config_file, [f"output_dir={tmp_path}", *small, *limits]))
    with safe_open(tmp_path / "failed-step-00000002-process-0.safetensors", "pt") as kept:
        names = {
            f"{i}.{name}"
            for i in (0, 1)
            for name in ("input_ids", "labels", "positions", "image_inputs", "text_targets", "image_targets")
        }
        assert set(kept.keys()) == names and not torch.equal(kept.get_tensor("0.labels"), kept.get_tensor("1.labels"))
        assert kept.metadata() == {"step": "2", "patch_size": "4", "learning_rate": str(rates[-1])}
    assert [r["step"] for r in read_log(tmp_path)] == [1, 2]  # the bad step changed and logged nothing


@pytest.mark.process
def test_fp16_that_finds_no_scale_stops(config_file, tmp_path, monkeypatch):
    monkeypatch.setattr(Accelerator, "optimizer_step_was_skipped", property(lambda self: True))
    with pytest.raises(
        FloatingPointError, match=r"not finite in 20 steps in a row, all skipped .* at step 19; the batches are kept"
    ):
        train(load_config(config_file, [f"output_dir={tmp_path}", "steps=40"]))
    assert [r["step"] for r in read_log(tmp_path) if "lr" in r][-1] == 19
    assert (tmp_path / "failed-step-00000019-process-0.safetensors").is_file()


def test_gradient_limit_of_fp16():
    """A norm that is finite but too large stops in fp16 too; one that is not finite is left to the loss scaler."""
    half = SimpleNamespace(mixed_precision="fp16")
    check_gradients(half, torch.tensor(float("inf")), 10.0)
    check_gradients(half, torch.tensor(9.0), 10.0)
    with pytest.raises(FloatingPointError, match=r"their norm is 11\.0"):
        check_gradients(half, torch.tensor(11.0), 10.0)


class DeepSpeedLike:
    """An accelerator that steps inside of backward, as DeepSpeed does."""

    distributed_type, num_processes, process_index, mixed_precision = DistributedType.DEEPSPEED, 1, 0, "no"
    sync_gradients, device, parallelism_config = True, torch.device("cpu"), None

    def __init__(self, optimizer):
        self.optimizer, self.rates = optimizer, []

    def accumulate(self, model):
        return contextlib.nullcontext()

    def backward(self, loss):
        self.rates.append(self.optimizer.param_groups[0]["lr"])

    def clip_grad_norm_(self, parameters, limit):
        return None


def test_deepspeed_steps_with_this_steps_rate_and_never_from_a_bad_loss(config_file, tmp_path):
    model = tiny_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    accelerator = DeepSpeedLike(optimizer)
    config = load_config(config_file, [f"output_dir={tmp_path}"])
    image = ImageSegment(torch.zeros(4, 4, dtype=torch.long))
    batch = make_batch([build_sequence([TextSegment([5, 6]), image], model.config.vocabulary)], model.config)
    rest = (config, LossMeter(accelerator))
    for rate in (0.5, 0.25):
        train_step(accelerator, model, [optimizer], [batch], rate, *rest)
    assert accelerator.rates == [0.5, 0.25]
    with torch.no_grad():
        model.image_head.weight.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match=r"loss: not finite on 1 process\(es\), nan on this one"):
        train_step(accelerator, model, [optimizer], [batch], 0.1, *rest)
    assert accelerator.rates == [0.5, 0.25]


def test_resume_without_checkpoint_is_an_error(config_file, tmp_path):
    with pytest.raises(ValueError, match="resume: no checkpoint in"):
        train(load_config(config_file, [f"output_dir={tmp_path}", "resume=latest"]))
    with pytest.raises(ValueError, match="is not a checkpoint folder"):
        train(load_config(config_file, [f"output_dir={tmp_path}", f"resume={tmp_path}/nowhere"]))

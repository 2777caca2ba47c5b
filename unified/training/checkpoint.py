"""Checkpoints that appear whole or not at all."""

import difflib
import json
import os
import shutil
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from unified.settings import dump_settings

_STATE_FILE = "trainer_state.json"
_SETTINGS_FILE = "settings.yaml"
_TRAINABLE_FILE = "trainable.safetensors"
# Settings that change nothing of what is learned.
_FREE = (
    "output_dir", "resume", "allow_changes", "keep_checkpoints", "checkpoint_every", "track_with", "project", "processes"
)  # fmt: skip


def save_checkpoint(
    accelerator: Accelerator,
    folder: Path,
    step: int,
    positions: int,
    keep: int,
    settings: object,
    inputs: dict[str, Any],
) -> None:
    """Write model, optimizer, EMA and random state after ``step`` steps; keep the last ``keep`` checkpoints.

    The files are written beside and renamed into place. The stage, the learning rate and the position in the data are
    functions of the step, so the step is all there is to store of them.

    Args:
        accelerator: holds the prepared objects.
        folder: parent of the checkpoints.
        step: finished optimizer steps.
        positions: backbone positions processed so far (the cost axis of the logs).
        keep: how many checkpoints to keep.
        settings: the run's dataclass of settings, kept beside so that a resumed run can be compared with them.
        inputs: what else it has to agree on, for JSON (see :func:`unified.training.inputs.describe_inputs`).

    Raises:
        OSError: if the disk is full; earlier checkpoints stay as they are.
    """
    final, partial = folder / f"step-{step:08d}", folder / f".partial-step-{step:08d}"
    accelerator.save_state(str(partial))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        (partial / _SETTINGS_FILE).write_text(_comparable(settings))
        (partial / _STATE_FILE).write_text(json.dumps({"step": step, "positions": positions, "inputs": inputs}))
        partial.rename(final)
        for old in list_checkpoints(folder)[:-keep]:
            _discard(old)
    accelerator.wait_for_everyone()


def start_checkpoint(resume: str | None, folder: Path) -> Path | None:
    """The checkpoint to start from, None for a new run.

    Raises:
        ValueError: if ``resume`` names none, or ``folder`` has checkpoints of another run.
    """
    found = list_checkpoints(folder)
    if resume is None:
        if found:
            raise ValueError(
                f"output_dir: {str(folder)!r} has checkpoints of an earlier run, up to {found[-1].name}; resume=latest goes "
                "on with it, another output_dir (or removing them) starts again."
            )
        return None
    path = find_checkpoint(resume, folder)
    if found and path.resolve() not in [other.resolve() for other in found]:
        raise ValueError(
            f"resume: {resume!r} is none of the checkpoints in {str(folder)!r}; resume one of those or choose another output_dir."
        )
    return path


def remove_stale(accelerator: Accelerator, folder: Path, step: int) -> None:
    """Clear ``folder`` for a run that goes on after ``step``: later checkpoints would be taken for its own, and kills
    leave halves behind.
    """
    accelerator.wait_for_everyone()  # all have listed the folder
    if accelerator.is_main_process:
        for path in list_checkpoints(folder):
            if _state_of(path)["step"] > step:
                _discard(path)
        for path in [*folder.glob(".partial-*"), *folder.glob(".old-*")]:
            shutil.rmtree(path)
    accelerator.wait_for_everyone()


def leave_out_frozen(accelerator: Accelerator) -> None:
    """Checkpoints without frozen weights, which a run brings along when it starts. Where weights are cut over processes,
    Accelerate writes all of them.
    """

    def trainable(models: list[nn.Module]) -> dict[str, nn.Parameter]:
        return {name: p for name, p in accelerator.unwrap_model(models[0]).named_parameters() if p.requires_grad}

    def save(models: list[nn.Module], weights: list[dict[str, Tensor]], folder: str) -> None:
        if weights:
            weights.clear()
            if accelerator.is_main_process:
                save_file({name: p.detach() for name, p in trainable(models).items()}, Path(folder) / _TRAINABLE_FILE)

    def load(models: list[nn.Module], folder: str) -> None:
        if models:
            kept, own = load_file(Path(folder) / _TRAINABLE_FILE), trainable(models)
            if kept.keys() != own.keys():
                raise ValueError(
                    f"resume: {folder!r} has weights of {sorted(kept.keys() ^ own.keys())[:4]} more or less."
                )
            with torch.no_grad():
                for name, parameter in own.items():
                    parameter.copy_(kept[name])
            models.clear()

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)


def write_whole(path: Path, text: str) -> None:
    """Replace a text file at once: a kill leaves the old one or the new one."""
    beside = path.with_name(f".new-{path.name}")
    beside.write_text(text)
    os.replace(beside, path)


def _state_of(path: Path) -> dict[str, Any]:
    return json.loads((path / _STATE_FILE).read_text())


def _discard(path: Path) -> None:
    """Remove a checkpoint that stops counting at once: a kill while its files go leaves no half one."""
    hidden = path.with_name(f".old-{path.name}")
    path.rename(hidden)
    shutil.rmtree(hidden)


def list_checkpoints(folder: Path) -> list[Path]:
    """Whole checkpoints in ``folder``, oldest first."""
    return sorted(path for path in folder.glob("step-*") if (path / _STATE_FILE).is_file())


def find_checkpoint(resume: str, folder: Path) -> Path:
    """Resolve ``latest`` or a path.

    Raises:
        ValueError: if there is no such checkpoint.
    """
    if resume == "latest":
        found = list_checkpoints(folder)
        if not found:
            raise ValueError(f"resume: no checkpoint in {str(folder)!r}; leave resume out to start again.")
        return found[-1]
    if not (Path(resume) / _STATE_FILE).is_file():
        raise ValueError(f"resume: {resume!r} is not a checkpoint folder; give one, or 'latest'.")
    return Path(resume)


def load_checkpoint(accelerator: Accelerator, path: Path) -> tuple[int, int]:
    """Restore the prepared objects; returns the finished steps and positions."""
    accelerator.load_state(str(path))
    state = _state_of(path)
    return state["step"], state["positions"]


def check_settings(path: Path, settings: object, allow_changes: bool) -> None:
    """Refuse to resume with other settings than those of the checkpoint, unless ``allow_changes`` is set.

    Raises:
        ValueError: with the difference, line by line.
    """
    _refuse_changes("settings", path, (path / _SETTINGS_FILE).read_text(), _comparable(settings), allow_changes)


def check_inputs(path: Path, inputs: dict[str, Any], allow_changes: bool) -> None:
    """Refuse to resume with other inputs than those of the checkpoint, unless ``allow_changes`` is set.

    Raises:
        ValueError: with the difference, line by line.
    """
    before, now = (_lines(each) for each in (_state_of(path).get("inputs", {}), inputs))
    _refuse_changes("inputs", path, before, now, allow_changes)


def _refuse_changes(what: str, path: Path, before: str, now: str, allow_changes: bool) -> None:
    changes = list(difflib.unified_diff(before.splitlines(), now.splitlines(), "checkpoint", "now", lineterm="", n=0))
    if changes and not allow_changes:
        raise ValueError(
            f"resume: the {what} differ from those of {str(path)!r}:\n"
            + "\n".join(changes)
            + "\nSet them back, or allow_changes=true to go on with the new ones."
        )


def _comparable(settings: Any) -> str:
    """Settings as YAML without those that may change freely."""
    free = {f.name: getattr(type(settings)(), f.name) for f in fields(settings) if f.name in _FREE}
    return dump_settings(replace(settings, **free))


def _lines(inputs: dict[str, Any]) -> str:
    return "\n".join(f"{name}: {json.dumps(value)}" for name, value in inputs.items())

"""Checkpoints that appear whole or not at all: safetensors and JSON (see ``state.py``), written beside and renamed."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from reprlib import repr as short
from typing import Any

import yaml
from accelerate import Accelerator

from unified.files import sync
from unified.settings import differences, dump_settings, flat
from unified.training.background import Background
from unified.training.state import read_state, take_state, write_state
from unified_tokenizers.fields import is_whole

_STATE_FILE = "trainer_state.json"
_SETTINGS_FILE = "settings.yaml"
# Settings that do not change what is trained.
_FREE = (
    "output_dir", "resume", "allow_changes", "keep_checkpoints", "checkpoint_every", "asynchronous_checkpoints", "track_with",
    "project", "processes", "sample", "sampling", "peak_flops",
)  # fmt: skip


def save_checkpoint(
    accelerator: Accelerator,
    folder: Path,
    step: int,
    positions: int,
    keep: int,
    settings: object,
    inputs: dict[str, Any],
    background: Background | None = None,
) -> None:
    """Write model, optimizer, EMA and random state after ``step`` steps; keep the last ``keep`` checkpoints.

    All files are on disk before the folder gets its name, so a kill at any time leaves the checkpoints before as they are.
    The stage, the learning rate and the position in the data are functions of the step. A checkpoint of this step that is
    there already is kept.

    Args:
        accelerator: holds the prepared objects.
        folder: parent of the checkpoints.
        step: finished optimizer steps.
        positions: backbone positions processed so far (the cost axis of the logs).
        keep: how many checkpoints to keep.
        settings: the run's dataclass of settings, saved for comparison when a run resumes.
        inputs: what else a resumed run has to share, for JSON (see :func:`unified.training.inputs.describe_inputs`).
        background: writes a copy in CPU memory while the caller goes on, after the checkpoint before. None writes at once.

    Raises:
        OSError: if the disk is full; earlier checkpoints stay as they are. Of ``background``, the error of the checkpoint before.
    """
    if background is not None:
        background.wait()
    final, partial = folder / f"step-{step:08d}", folder / f".partial-step-{step:08d}"
    if final.is_dir():
        return
    run = take_state(accelerator)
    if background is not None:
        run = replace(run, tensors=background.copy(run.tensors))
    wait = accelerator.wait_for_everyone if background is None else background.barrier

    def write() -> None:
        if accelerator.is_main_process:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        wait()
        write_state(accelerator, partial, run, None if background is None else background.group)
        wait()
        if accelerator.is_main_process:
            (partial / _SETTINGS_FILE).write_text(dump_settings(settings))
            sizes = {str(file.relative_to(partial)): file.stat().st_size for file in _files(partial)}
            state = {"step": step, "positions": positions, "inputs": inputs, "numbers": run.numbers, "files": sizes}
            (partial / _STATE_FILE).write_text(json.dumps(state))
            for path in [*partial.rglob("*"), partial]:
                sync(path)
            partial.rename(final)
            sync(folder)
            for old in list_checkpoints(folder)[:-keep]:
                _discard(old)
        wait()

    if background is None:
        write()
    else:
        background.start(write)


def start_checkpoint(resume: str | None, folder: Path) -> Path | None:
    """The checkpoint to start from, None for a new run.

    Raises:
        ValueError: if ``resume`` names none or a damaged one, or ``folder`` has checkpoints of another run.
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


def find_checkpoint(resume: str, folder: Path) -> Path:
    """Resolve ``latest`` or a path.

    Raises:
        ValueError: if there is no such checkpoint, or it is damaged, naming the last whole one before it.
    """
    if resume == "latest":
        found = list_checkpoints(folder)
        if not found:
            raise ValueError(f"resume: no checkpoint in {str(folder)!r}; leave resume out to start again.")
        path = found[-1]
    else:
        path = Path(resume)
        if not path.is_dir() or not (path.name.startswith("step-") or (path / _STATE_FILE).is_file()):
            raise ValueError(f"resume: {resume!r} is not a checkpoint folder; give one, or 'latest'.")
    if damage := _damage(path):
        before = [other for other in list_checkpoints(path.parent) if other.name < path.name and not _damage(other)]
        fix = f"resume={before[-1]} goes on from the one before it." if before else "No whole one comes before it."
        raise ValueError(f"resume: {str(path)!r} is damaged: {damage}. {fix}")
    return path


def list_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints in ``folder``, oldest first."""
    return sorted(folder.glob("step-[0-9]*"))


def remove_stale(accelerator: Accelerator, folder: Path, step: int) -> None:
    """Clear ``folder`` for a run that goes on after ``step``: remove later checkpoints, which are not this run's, and what a
    kill left half written or half removed.
    """
    accelerator.wait_for_everyone()  # all have listed the folder
    if accelerator.is_main_process:
        for path in list_checkpoints(folder):
            if int(path.name.removeprefix("step-")) > step:
                _discard(path)
        for path in [*folder.glob(".partial-*"), *folder.glob(".old-*")]:
            shutil.rmtree(path)
    accelerator.wait_for_everyone()


def load_checkpoint(accelerator: Accelerator, path: Path) -> tuple[int, int]:
    """Restore the prepared objects and the random streams; returns the finished steps and positions.

    Raises:
        ValueError: as :func:`unified.training.state.read_state`.
    """
    state = _state_of(path)
    read_state(accelerator, path, state["numbers"])
    return state["step"], state["positions"]


def check_settings(path: Path, settings: object, allow_changes: bool) -> None:
    """Refuse to resume with other settings than those of the checkpoint, unless ``allow_changes`` is set.

    Raises:
        ValueError: naming the settings that differ.
    """
    try:
        kept = yaml.safe_load((path / _SETTINGS_FILE).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"resume: {str(path / _SETTINGS_FILE)!r} is no YAML ({error}).") from error
    before, now = (
        {name: value for name, value in flat(values) if name.split(".")[0] not in _FREE}
        for values in (kept if isinstance(kept, dict) else {}, yaml.safe_load(dump_settings(settings)))
    )
    _check_same("settings", path, before, now, allow_changes)


def check_inputs(path: Path, inputs: dict[str, Any], allow_changes: bool) -> None:
    """Refuse to resume with other inputs than those of the checkpoint, unless ``allow_changes`` is set.

    Raises:
        ValueError: naming the inputs that differ.
    """
    _check_same("inputs", path, _state_of(path)["inputs"], json.loads(json.dumps(inputs)), allow_changes)


def _check_same(what: str, path: Path, before: dict[str, Any], now: dict[str, Any], allow_changes: bool) -> None:
    different = differences(before, now)
    if different and not allow_changes:
        raise ValueError(
            f"resume: the {what} differ from those of {str(path)!r} ({different}); set them back, or allow_changes=true to go "
            "on with the new ones."
        )


def _state_of(path: Path) -> dict[str, Any]:
    """What a checkpoint says of itself. Raises ValueError if it is not whole."""
    state = json.loads((path / _STATE_FILE).read_text(encoding="utf-8"))
    if not isinstance(state, dict):
        raise ValueError(f"it holds a {type(state).__name__}")
    for name in ("step", "positions"):
        if not is_whole(state.get(name), 0):
            raise ValueError(f"{name} is {state.get(name)!r}")
    for name in ("inputs", "numbers", "files"):
        if not isinstance(state.get(name), dict):
            raise ValueError(f"{name} is {short(state.get(name))}")
    missing = sorted({"num_processes", "device", "optimizers", "schedulers", "scaler"} - state["numbers"].keys())
    if missing:
        raise ValueError(f"numbers lack {missing}")
    return state


def _damage(path: Path) -> str | None:
    """What is wrong with the files of a checkpoint; None if all are there in full length."""
    try:
        sizes = _state_of(path)["files"]
    except (OSError, ValueError) as error:
        return f"{_STATE_FILE} is missing, cut or of an earlier version ({error})"
    for name, size in sizes.items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} of {size} bytes"
    return None


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _discard(path: Path) -> None:
    """Remove a checkpoint; it loses its name first, so a kill in between leaves no half one."""
    hidden = path.with_name(f".old-{path.name}")
    path.rename(hidden)
    shutil.rmtree(hidden)

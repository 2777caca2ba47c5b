"""Checkpoints that appear whole or not at all."""

import json
import shutil
from pathlib import Path

from accelerate import Accelerator

_STATE_FILE = "trainer_state.json"


def save_checkpoint(accelerator: Accelerator, folder: Path, step: int, slots: int, keep: int) -> None:
    """Write model, optimizer, EMA and random state after ``step`` steps; keep the last ``keep`` checkpoints.

    The files are written beside and renamed into place. The stage, the learning rate and the position in the data are
    functions of the step, so the step is all there is to store of them.

    Args:
        accelerator: holds the prepared objects.
        folder: parent of the checkpoints.
        step: finished optimizer steps.
        slots: backbone slots processed so far (the cost axis of the logs).
        keep: how many checkpoints to keep.
    """
    final, partial = folder / f"step-{step:08d}", folder / f".partial-step-{step:08d}"
    if accelerator.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(partial))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        (partial / _STATE_FILE).write_text(json.dumps({"step": step, "slots": slots}))
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        for old in list_checkpoints(folder)[:-keep]:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()


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
            raise ValueError(f"resume: no checkpoint in {str(folder)!r}; leave resume out to start anew.")
        return found[-1]
    if not (Path(resume) / _STATE_FILE).is_file():
        raise ValueError(f"resume: {resume!r} is not a checkpoint folder; give one, or 'latest'.")
    return Path(resume)


def load_checkpoint(accelerator: Accelerator, path: Path) -> tuple[int, int]:
    """Restore the prepared objects; returns the finished steps and slots."""
    accelerator.load_state(str(path))
    state = json.loads((path / _STATE_FILE).read_text())
    return state["step"], state["slots"]

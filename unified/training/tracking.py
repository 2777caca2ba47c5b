"""The metrics of a run: a JSONL log, trackers, sheets of samples."""

import importlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from PIL.Image import Image
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import make_grid

from unified.files import write_text
from unified.pipeline.arguments import seeded
from unified.pipeline.metadata import describe, write_png
from unified.pipeline.options import SAMPLING, GenerationOptions
from unified.pipeline.pipeline import UnifiedPipeline
from unified.settings import flat
from unified.training.config import SampleConfig, TrainConfig

LOG_FILE = "log.jsonl"


def check_trackers(names: Sequence[str]) -> None:
    """Raises ValueError for a tracker that Accelerate does not know or whose package is missing."""
    known, installed = sorted(map(str, LOGGER_TYPE_TO_CLASS)), list(map(str, get_available_trackers()))
    for name in names:
        if name not in known:
            raise ValueError(f"track_with: {name!r} is unknown; use some of {known}, or [] for none.")
        if name not in installed:
            raise ValueError(
                f"track_with: {name!r} is not installed; `pip install {name}`, or leave it out of the list."
            )


def start_trackers(accelerator: Accelerator, config: TrainConfig, step: int) -> None:
    """Open the trackers for a run that goes on after ``step``; TensorBoard drops what an earlier part wrote beyond it."""
    purge = {"tensorboard": {"purge_step": step + 1}} if step else {}
    settings = {name: v if isinstance(v, int | float | str) else str(v) for name, v in flat(asdict(config))}
    accelerator.init_trackers(config.project, settings, purge)


class RunLog:
    """A line of JSON per record in ``<output_dir>/log.jsonl``, and the same metrics to Accelerate's trackers."""

    def __init__(self, accelerator: Accelerator, output_dir: Path, resumed_at: int):
        self.accelerator, self.path = accelerator, output_dir / LOG_FILE
        if accelerator.is_main_process:
            # A resumed run continues its log; it writes lines past the checkpoint again.
            kept = [line for line in read_log(output_dir) if line["step"] <= resumed_at] if resumed_at else []
            write_text(self.path, "".join(json.dumps(line) + "\n" for line in kept))

    def write(self, step: int, **values: Any) -> None:
        """Record metrics after ``step`` steps."""
        if self.accelerator.is_main_process:
            with self.path.open("a") as file:
                file.write(json.dumps({"step": step, **values}) + "\n")
        self.accelerator.log({name: value for name, value in values.items() if value is not None}, step=step)

    def samples(self, step: int, pipeline: UnifiedPipeline, config: SampleConfig) -> None:
        """Generate the sample prompts or classes, with fixed seeds, into ``samples/step-N.png`` and for the trackers."""
        if not self.accelerator.is_main_process:
            return
        pipeline.set_progress_bar_config(disable=True)
        count = len(config.prompts or config.class_labels)
        images = pipeline(
            config.prompts or None, class_labels=config.class_labels or None, guidance_scale=config.guidance_scale,
            generator=seeded(config.seed, count), output_type="pt",
        ).images  # fmt: skip
        grid = make_grid(torch.as_tensor(images), nrow=min(8, count), padding=2, pad_value=1)
        sheet = to_pil_image((grid * 255).round().to(torch.uint8))
        run, options = self.path.parent.resolve().name, GenerationOptions(guidance_scale=config.guidance_scale)
        settings = {name: getattr(options.filled(pipeline.sampling), name) for name in SAMPLING}
        labels = [str(each) for each in config.prompts or config.class_labels]
        describe(sheet, prompts=labels, seed=config.seed, settings=settings, model=f"{run}, step {step}")
        folder = self.path.parent / "samples"
        folder.mkdir(exist_ok=True)
        write_png(sheet, folder / f"step-{step:08d}.png")
        self._track(sheet, step)

    def _track(self, image: Image, step: int) -> None:
        """Give an image to those trackers that take images."""
        for tracker in self.accelerator.trackers:
            if tracker.name == "tensorboard":
                tracker.writer.add_image("samples", np.asarray(image), step, dataformats="HWC")
            elif tracker.name in ("wandb", "swanlab"):
                tracker.log_images({"samples": [image]}, step=step)
            elif tracker.name == "trackio":
                tracker.log({"samples": importlib.import_module("trackio").Image(image)}, step=step)


def sum_over_processes(accelerator: Accelerator, values: Sequence[float]) -> list[float]:
    """Sums of numbers over all processes. One process leaves the device alone: not every device has float64."""
    if accelerator.num_processes == 1:
        return list(values)
    return accelerator.reduce(torch.tensor(values, dtype=torch.float64, device=accelerator.device), "sum").tolist()


class LossMeter:
    """Means of named losses since the last reading, over all batches and processes. A loss may be None."""

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self._losses: dict[str, list[tuple[torch.Tensor, float]]] = {}

    def add(self, **losses: tuple[torch.Tensor | None, float]) -> None:
        """Add a batch's mean losses, each with the number of positions that it is the mean of."""
        for name, (loss, weight) in losses.items():
            seen = self._losses.setdefault(name, [])
            if loss is not None:
                seen.append((loss.detach(), weight))  # read later: that waits for the device

    def means(self) -> dict[str, float]:
        """Means by name, without those that never occurred; starts again."""
        sums = [[sum(float(x) * w for x, w in seen), sum(w for _, w in seen)] for seen in self._losses.values()]
        flat = sum_over_processes(self.accelerator, [number for pair in sums for number in pair])
        found = dict(zip(self._losses, zip(flat[::2], flat[1::2], strict=True), strict=True))
        self._losses.clear()
        return {name: total / weight for name, (total, weight) in found.items() if weight}


def read_log(output_dir: Path) -> list[dict[str, Any]]:
    """All records of a run's log, oldest first; empty without a log. A last line without its end, as a kill leaves it, is
    left out.
    """
    path = output_dir / LOG_FILE
    lines = path.read_text().splitlines(keepends=True) if path.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]

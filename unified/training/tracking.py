"""What a run leaves behind to look at: a JSONL log, trackers, sample grids."""

import json
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torchvision.utils import make_grid, save_image

from unified.pipeline import UnifiedPipeline
from unified.training.checkpoint import write_whole
from unified.training.config import SampleConfig

LOG_FILE = "log.jsonl"


class RunLog:
    """One line of JSON per record, and the same figures to Accelerate's trackers."""

    def __init__(self, accelerator: Accelerator, output_dir: Path, resumed_at: int):
        self.accelerator, self.path = accelerator, output_dir / LOG_FILE
        if accelerator.is_main_process:
            # A resumed run continues its log; lines past the checkpoint will be written again.
            kept = [line for line in read_log(output_dir) if line["step"] <= resumed_at] if resumed_at else []
            write_whole(self.path, "".join(json.dumps(line) + "\n" for line in kept))

    def write(self, step: int, **figures: Any) -> None:
        """Record figures after ``step`` steps."""
        if self.accelerator.is_main_process:
            with self.path.open("a") as file:
                file.write(json.dumps({"step": step, **figures}) + "\n")
        self.accelerator.log({name: value for name, value in figures.items() if value is not None}, step=step)

    def pictures(self, step: int, pipeline: UnifiedPipeline, config: SampleConfig) -> None:
        """Draw the sample prompts with fixed seeds into ``samples/step-N.png``."""
        if not self.accelerator.is_main_process:
            return
        pipeline.set_progress_bar_config(disable=True)
        generators = [torch.Generator().manual_seed(config.seed + i) for i in range(len(config.prompts))]
        images = pipeline(
            config.prompts, guidance_scale=config.guidance_scale, generator=generators, output_type="pt"
        ).images
        grid = make_grid(
            torch.as_tensor(images),
            nrow=min(8, len(config.prompts)),
            padding=2,
            pad_value=1,
            normalize=True,
            value_range=(-1, 1),
        )
        folder = self.path.parent / "samples"
        folder.mkdir(exist_ok=True)
        save_image(grid, folder / f"step-{step:08d}.png")
        for tracker in self.accelerator.trackers:
            if tracker.name == "tensorboard":
                tracker.writer.add_image("samples", grid, step)


class LossMeter:
    """Means of named losses over the steps since the last reading, over all processes. A loss may be absent (None)."""

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self._sums: dict[str, torch.Tensor] = {}

    def add(self, **losses: torch.Tensor | None) -> None:
        """Add one step's losses."""
        for name, loss in losses.items():
            if name not in self._sums:
                self._sums[name] = torch.zeros(2, dtype=torch.float64, device=self.accelerator.device)
            if loss is not None:
                self._sums[name] += torch.stack([loss.detach().double(), torch.ones_like(loss, dtype=torch.float64)])

    def means(self) -> dict[str, float]:
        """Means by name, without those that never occurred; starts anew."""
        found = {name: self.accelerator.reduce(sums, "sum").tolist() for name, sums in self._sums.items()}
        self._sums.clear()
        return {name: total / count for name, (total, count) in found.items() if count}


def read_log(output_dir: Path) -> list[dict[str, Any]]:
    """All records of a run's log, oldest first; empty without a log. A last line without its end (the run was killed
    while it wrote, or is writing) is left out.
    """
    path = output_dir / LOG_FILE
    lines = path.read_text().splitlines(keepends=True) if path.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]

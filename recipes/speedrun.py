"""The project's measure of performance: how fast two CPU cores train a model to a fixed quality on held-out captions.

    make speedrun

Data, tokenizers and codes are those of the quickstart, and are not timed. `configs/speedrun.yaml` is: a run counts if the
trained model needs at most 0.10 nats for a code of the held-out scenes, whose captions no training row has. Anything in that
config and in the library may change to make it faster. Prints the run as a row of the table in recipes/README.md and writes
`runs/speedrun/result.json`; ends with an error if the target is missed.
"""

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from next_x_study import flops_per_image
from quickstart import PROCESSES, ROOT, TRAIN, run
from unified import UnifiedPipeline
from unified.data import load_source
from unified.data.code_cache import load_codes
from unified.errors import explain_errors
from unified.files import write_json
from unified.lora.base import base_of
from unified.settings import load_settings
from unified.training.config import TrainConfig
from unified.training.validation import image_loss
from unified_eval.generation import stream_images
from unified_eval.shapes import claims_of_caption, shapes_accuracy

CONFIG = "recipes/configs/speedrun.yaml"
SCENES = Path("runs/quickstart/data/scenes")
OUT = Path("runs/speedrun")
TARGET = 0.10  # nats a code


def measure(seconds: float) -> dict[str, Any]:
    """The metrics of a finished training: cost, loss on all held-out rows, and 256 of their captions generated exactly."""
    config = load_settings(TrainConfig, OUT / "config.yaml")
    pipeline = UnifiedPipeline.from_pretrained(OUT / "pipeline")
    model = base_of(pipeline.model)
    held_out = load_codes(str(config.data.train), "validation", None, "captioned")
    loss = image_loss(model, held_out, pipeline.text_tokenizer, model.config, 32, torch.device("cpu"))
    captions = [str(caption) for caption in load_source(str(SCENES), "validation")["caption"]][:256]
    images = list(stream_images(pipeline, captions, range(len(captions))))
    checked = shapes_accuracy(images, [claims_of_caption(caption) for caption in captions])
    return {
        "seconds": seconds, "flops": flops_per_image(config) * config.steps * config.batch_size * PROCESSES, "nats_per_code": loss,
        "captions_drawn_exactly": checked.metrics["shapes_correct"], "processes": PROCESSES, "commit": commit(),
    }  # fmt: skip


def commit() -> str:
    """The commit of the working tree, with a + if files differ from it."""
    found = subprocess.run(["git", "describe", "--always", "--dirty=+"], cwd=ROOT, capture_output=True, text=True)
    return found.stdout.strip() or "unknown"


def main(argv: Sequence[str] | None = None) -> None:
    """Prepare what is missing, train, measure, print."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args(argv)
    os.chdir(ROOT)
    shutil.rmtree(OUT, ignore_errors=True)
    subprocess.run([sys.executable, "recipes/quickstart.py", "--until", "codes"], check=True)
    seconds, memory = run([*TRAIN, f"batch_size={16 // PROCESSES}", "--config", CONFIG])
    result = measure(seconds) | {"peak_memory_gb": memory}
    write_json(OUT / "result.json", result)
    print(
        f"\n| {seconds / 60:.1f} | {result['flops']:.2g} | {result['nats_per_code']:.4f} "
        f"| {result['captions_drawn_exactly']:.2f} | {result['commit']} |"
    )
    if result["nats_per_code"] > TARGET:
        raise ValueError(f"{CONFIG}: {result['nats_per_code']:.4f} nats a code; a run counts at {TARGET} or less.")


if __name__ == "__main__":
    explain_errors(main)

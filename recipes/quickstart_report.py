"""Gather a quickstart run: the pipeline and the adapter, the sheets, `metrics.json` and `report.html`.

python recipes/quickstart_report.py --run runs/quickstart
"""

import argparse
import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
from PIL import Image

from quickstart import PROCESSES
from unified import PatchSchedule, UnifiedPipeline
from unified.errors import explain_errors
from unified.files import write_json
from unified.lora.base import base_of
from unified.pipeline.arguments import seeded
from unified.settings import load_settings
from unified.training.config import TrainConfig
from unified.training.tracking import read_log
from unified_eval.curves import plot_loss
from unified_eval.files import write_image
from unified_eval.report import write_report
from unified_eval.results import recipe_line
from unified_eval.shapes import claims_of_caption, shapes_accuracy, without_pastel
from unified_eval.sheets import captioned_grid

STYLE_PROMPTS = [
    "a red star on a white background",
    "a large blue circle on a yellow background",
    "a green heart on a black background",
    "a small purple square on a pink background",
    "an orange triangle on a white background",
    "a large white cross on a blue background",
    "a black diamond on an orange background",
    "a pink star on a green background",
]
EDITS = [  # captions that differ in one word
    ("a red star on a white background", "a red heart on a white background"),
    ("a blue circle on a yellow background", "a green circle on a yellow background"),
    ("a large orange square on a black background", "a small orange square on a black background"),
    ("a white heart on a red background", "a white heart on a blue background"),
    ("a purple triangle on a white background", "a purple diamond on a white background"),
    ("a large pink cross on a green background", "a large black cross on a green background"),
    ("a green star on a pink background", "a green star on a white background"),
    ("a small brown diamond on a yellow background", "a large brown diamond on a yellow background"),
]
HEADLINE = ["tokenizer_psnr_db", "fd_efflite0", "clip_score", "r1_generated", "r1_reconstructions", "r1_real"]
EXACT = ["shapes_correct", "shapes_correct_reconstructions", "shapes_correct_real"]


def generate(
    pipe: UnifiedPipeline, prompts: list[str], sampling: dict[str, Any], seed: int = 0
) -> tuple[list[Image.Image], torch.Tensor]:
    """Images and codes; prompt i has the generator of ``seed + i``."""
    generators = seeded(seed, len(prompts))
    output = pipe(prompts, generator=generators, **sampling)
    return list(output.images), output.codes


def generate_edits(
    pipe: UnifiedPipeline, edits: list[tuple[str, str]], sampling: dict[str, Any], out: Path
) -> tuple[dict[str, float], list[Image.Image]]:
    """Generate from captions, then from their edits with the same generators and with others.

    Returns:
        The share of codes that stay in either case, and the images of the edited captions with the same generators.

    Raises:
        ValueError: if there is no pair of captions.
    """
    if not edits:
        raise ValueError("edits: no pair of captions; give at least one.")
    captions, edited = (list(texts) for texts in zip(*edits, strict=True))
    before, codes = generate(pipe, captions, sampling)
    same, same_codes = generate(pipe, edited, sampling)
    other, other_codes = generate(pipe, edited, sampling, seed=len(edits))
    changed = codes != same_codes
    shares = [f"{share:.0%} of the codes" for share in changed.flatten(1).float().mean(dim=1).tolist()]
    titles = ["caption", "edited, same generator", "codes that changed", "edited, another generator"]
    maps = [cell_map(cells) for cells in changed]
    rows = [before, same, maps, other]
    write_image(out, captioned_grid(rows, [captions, edited, shares, edited], row_titles=titles))
    kept = {
        "edit_codes_kept": float((codes == same_codes).float().mean()),
        "other_seed_codes_kept": float((codes == other_codes).float().mean()),
    }
    return kept, same


def cell_map(cells: torch.Tensor, side: int = 8) -> Image.Image:
    """Cells ``(h, w)`` as squares of ``side`` pixels, dark where True."""
    grey = torch.where(cells, 40, 235).to("cpu", torch.uint8)
    return Image.fromarray(grey.repeat_interleave(side, 0).repeat_interleave(side, 1).numpy())


def generate_with_and_without(
    pipe: UnifiedPipeline, lora: Path, prompts: list[str], captions: list[str], sampling: dict[str, Any], out: Path
) -> dict[str, Any]:
    """Generate from the same prompts and seeds without, with, and again without the adapter; first and last must agree.

    ``captions`` are generated with the adapter alone and checked, with the style's white taken out again.
    """
    plain, codes = generate(pipe, prompts, sampling)
    pipe.load_lora_weights(lora, adapter_name="pastel")
    styled, styled_codes = generate(pipe, prompts, sampling)
    checked = [without_pastel(image) for image in generate(pipe, captions, sampling)[0]]
    pipe.unload_lora_weights()
    _, codes_after = generate(pipe, prompts, sampling)
    if not torch.equal(codes, codes_after):
        raise RuntimeError("lora: the base model samples other codes after unloading the adapter.")
    write_image(out, captioned_grid([plain, styled], [prompts, prompts], row_titles=["base", "with adapter"]))
    return {
        "lora_codes_changed": float((codes != styled_codes).float().mean()),
        "lora_unloaded_equals_base": True,
        "lora_saturation": [saturation(plain), saturation(styled)],
        "lora_shapes_correct": shapes_accuracy(checked, list(map(claims_of_caption, captions))).metrics[
            "shapes_correct"
        ],
    }


def saturation(images: list[Image.Image]) -> float:
    """Mean HSV saturation of images, 0 (grey) to 1."""
    values = [
        torch.frombuffer(bytearray(i.convert("HSV").getchannel("S").tobytes()), dtype=torch.uint8) for i in images
    ]
    return float(torch.stack(values).float().mean() / 255)


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line and write pipeline, adapter, sheets, metrics and report into the run's folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="folder of the quickstart run")
    run: Path = parser.parse_args(argv).run

    for part in ("model/pipeline", "lora_run/lora", "evaluation/metrics.json"):
        if not (run / part).exists():
            raise ValueError(f"run: {str(run)!r} has no {part}; give the folder of a finished quickstart.")
    for source, name in ((run / "model" / "pipeline", "pipeline"), (run / "lora_run" / "lora", "lora")):
        shutil.rmtree(run / name, ignore_errors=True)
        shutil.copytree(source, run / name)
    for sheet in ("samples.png", "comparison.png"):
        shutil.copyfile(run / "evaluation" / sheet, run / sheet)
    pipe = UnifiedPipeline.from_pretrained(run / "pipeline")
    evaluation = json.loads((run / "evaluation" / "metrics.json").read_text())
    sampling = {name: evaluation["run"][name] for name in ("guidance_scale", "temperature")}
    captions = evaluation["run"]["captions"]
    lora = generate_with_and_without(pipe, run / "lora", STYLE_PROMPTS, captions, sampling, run / "lora.png")
    edits, edited = generate_edits(pipe, EDITS, sampling, run / "edits.png")
    claims = [claims_of_caption(after) for _, after in EDITS]
    edits["edits_correct"] = shapes_accuracy(edited, claims).metrics["shapes_correct"]

    log = read_log(run / "model")
    plot_loss(log, run / "loss.png", "Loss against cost", pipe.image_tokenizer.codebook_size)

    steps = json.loads((run / "steps.json").read_text())
    me = psutil.Process()
    finished = {name: step for name, step in steps.items() if step["seconds"] is not None and name != "report"}
    seconds = {name: round(step["seconds"], 1) for name, step in finished.items()}
    seconds["report"] = round(time.time() - me.create_time(), 1)
    memory = [step["peak_memory_gb"] for step in finished.values()] + [me.memory_info().rss / 1e9]
    config = load_settings(TrainConfig, run / "model" / "config.yaml")
    schedule: PatchSchedule = config.patch_schedule()
    side = base_of(pipe.model).prediction.merge.side  # of the windows of the last stage
    cost = sum(share / max(size, side) ** 2 for size, share in schedule.size_shares().items())
    measured, recipes = evaluation["metrics"], evaluation["recipes"]
    metrics = {
        "seconds_total": round(sum(seconds.values()), 1),
        "peak_memory_gb": round(max(memory), 2),
        **measured,
        # No training row has these captions.
        **{f"held_out_{name}": measured[name] for name in HEADLINE if name.startswith("r1_")},
        **{f"held_out_{name}": measured[name] for name in EXACT},
        **lora,
        **edits,
        "image_cost_relative_to_next_token": cost,
        "training_images_seen": config.steps * config.batch_size * PROCESSES,
        "final_validation": {
            k: v for k, v in [r for r in log if "validation_loss" in r][-1].items() if k.endswith("loss")
        },
        "seconds": seconds,
        "recipes": recipes,
        "run": evaluation["run"],
    }
    write_json(run / "metrics.json", metrics)
    write_report(
        run / "report.html",
        "Quickstart: a small language model that generates images of captions it has never seen",
        opening=[
            (run / "comparison.png",
             "Held-out captions: the real image, the same through the image tokenizer, and what the model generated."),
        ],
        metrics=[
            *((recipes[name]["label"], measured[name], recipe_line(recipes[name])) for name in (*EXACT, *HEADLINE)),
            ("Edited captions generated exactly", edits["edits_correct"], f"{len(EDITS)} captions with one word changed"),
            ("Generated exactly with the LoRA adapter, in its pastel colours", lora["lora_shapes_correct"],
             f"the same {len(captions)} captions; checked with the white taken out again"),
            ("Codes that stay when a word of the caption changes", edits["edit_codes_kept"],
             f"the same generator, {len(EDITS)} pairs; with another {edits['other_seed_codes_kept']:.3f}"),
            ("Image positions processed, relative to next-token training", cost,
             f"patch sizes {list(schedule.patch_sizes)} for {list(schedule.shares)} of the steps, windows of side {side}"),
            ("Wall time, seconds", metrics["seconds_total"], "sum of all steps on this machine"),
            ("Peak memory, GB", metrics["peak_memory_gb"], "largest resident memory of any step with its children"),
        ],
        tables={
            "Every metric": [{"metric": recipes[name]["label"], "value": value, "recipe": recipe_line(recipes[name])}
                             for name, value in measured.items()],
            "Time of each step": [{"step": name, "seconds": value} for name, value in seconds.items()],
        },
        images=[
            (run / "samples.png", "One generated image for each of 64 held-out captions; none was selected."),
            (run / "edits.png",
             "One word of each caption changed, with the same generator and with another; dark: codes that changed."),
            (run / "lora.png", "The same prompts and seeds without and with the LoRA adapter."),
            (run / "loss.png", "Loss against cost. Validation is that of the last stage (p = 1) at every point."),
        ],
        commands=["make quickstart", *(step["command"] for step in steps.values())],
        notes=["Everything here was made by one command on this machine, from data to images. A tenth of all captions, chosen by "
               "their words, is in no training row: the images below are of these."],
    )  # fmt: skip
    for name in ["seconds_total", "peak_memory_gb", *EXACT, *HEADLINE]:
        print(f"{name:<22} {metrics[name]:.3f}")


if __name__ == "__main__":
    explain_errors(main)

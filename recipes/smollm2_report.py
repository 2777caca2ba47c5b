"""Check two promises of a LoRA run on a language model: it generates images, and its text is unchanged with the adapter off.

    accelerate launch recipes/train.py --config recipes/configs/smollm2_lora.yaml
    python recipes/smollm2_report.py --run runs/smollm2 --backbone data/smollm2

Writes `report.json`, `loss.png` and `samples.png` into the run's folder; the exit code is 1 if a promise is broken.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from unified import UnifiedPipeline
from unified.errors import explain_errors
from unified.lora.base import base_of
from unified.training.config import TrainConfig, load_config
from unified.training.data import open_data
from unified.training.sources import Context
from unified.training.tracking import read_log
from unified.training.validation import image_loss
from unified_eval.curves import plot_loss
from unified_eval.generation import stream_images
from unified_eval.selection import choose_evenly
from unified_eval.sheets import captioned_grid, in_rows

QUESTION = "The capital of France is"
# The perplexity in recipes/README.md is of this text: change both together.
PARAGRAPH = (
    "A language model reads a text word by word and guesses how it goes on. The better it knows the world that the text "
    "speaks of, the less often it is surprised. Whoever teaches it something new, such as drawing, has to take care that "
    "it does not forget how to read: a model that draws well and can no longer finish a sentence is of little use."
)


def code_entropy(train: datasets.Dataset, validation: datasets.Dataset, codebook_size: int) -> float:
    """Cross-entropy of the validation codes under the training codes' frequencies plus one, in nats a code."""
    seen, held_out = (np.concatenate([np.ravel(codes) for codes in rows["codes"]]) for rows in (train, validation))
    counts = np.bincount(seen, minlength=codebook_size) + 1
    return float(-np.log(counts / counts.sum())[held_out].mean())


def seconds_of(log: list[dict[str, Any]], config: TrainConfig) -> float:
    """Time of all logged steps, from their speed. Settings without ``processes`` are taken for one process."""
    per_step = config.batch_size * config.gradient_accumulation_steps * (config.processes or 1)
    speeds = [record["images_per_second"] for record in log if "images_per_second" in record]
    return sum(config.log_every * per_step / speed for speed in speeds)


def perplexity(logits: Tensor, ids: Tensor) -> float:
    """Of ids ``(1, T)`` under logits ``(1, T, V)``."""
    return F.cross_entropy(logits[0, :-1].float(), ids[0, 1:]).exp().item()


def answer_ids(model: Any, tokenizer: Any, question: str) -> Tensor:
    """The greedy continuation ``(T,)``."""
    ids = tokenizer(question, return_tensors="pt").input_ids
    options = {"max_new_tokens": 12, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    return model.generate(ids, **options)[0, ids.shape[1] :]


@torch.no_grad()
def text_metrics(pipe: UnifiedPipeline, backbone: str, expect: str) -> tuple[dict[str, Any], dict[str, bool]]:
    """The plain backbone's text beside that of the pipeline with its adapter off and on; metrics and promises."""
    tokenizer = AutoTokenizer.from_pretrained(backbone, trust_remote_code=False)
    plain: Any = AutoModelForCausalLM.from_pretrained(backbone, trust_remote_code=False, dtype=torch.float32).eval()
    ids = tokenizer(PARAGRAPH, return_tensors="pt").input_ids

    def speak(model: Any) -> tuple[Tensor, Tensor]:
        return model(ids).logits, answer_ids(model, tokenizer, QUESTION)

    spoken = {"backbone": speak(plain)}
    pipe.disable_lora()
    spoken["adapter_off"] = speak(base_of(pipe.model))
    pipe.enable_lora()
    spoken["adapter_on"] = speak(base_of(pipe.model))
    metrics: dict[str, Any] = {
        "question": QUESTION,
        "perplexity": {name: perplexity(logits, ids) for name, (logits, _) in spoken.items()},
        "answer": {name: tokenizer.decode(answer, skip_special_tokens=True) for name, (_, answer) in spoken.items()},
    }
    logits, answer = (torch.equal(*pair) for pair in zip(spoken["backbone"], spoken["adapter_off"], strict=True))
    return metrics, {
        "adapter off: the backbone's text logits": logits,
        "adapter off: the backbone's answer": answer,
        f"adapter off: the answer contains {expect!r}": expect in metrics["answer"]["adapter_off"],
    }


def sample_sheet(
    pipe: UnifiedPipeline, captions: list[str], guidance_scale: float, temperature: float, out: Path
) -> None:
    """A sheet of one image for each caption, with fixed seeds."""
    seeds = range(len(captions))
    images = list(stream_images(pipe, captions, seeds, guidance_scale=guidance_scale, temperature=temperature))
    captioned_grid(in_rows(images, 8), in_rows(captions, 8)).save(out)


def report(
    run: Path, backbone: str, guidance_scale: float = 1.5, temperature: float = 0.5, expect: str = "Paris"
) -> dict[str, Any]:
    """Measure a finished run and write the report's files into it.

    Args:
        run: folder of a LoRA run with ``model.backbone``: ``config.yaml``, ``log.jsonl``, ``base/``, ``lora/``.
        backbone: the language model that it started from, folder or Hub name.
        guidance_scale, temperature: of the samples.
        expect: text that the answer to the question contains.

    Returns:
        Metrics, and ``promises``: whether each of them is kept.

    Raises:
        ValueError: if the folder holds no such run.
    """
    config = load_config(run / "config.yaml", [f"output_dir={run}", "validate_every=1"])
    pipe = UnifiedPipeline.from_pretrained(run / "base")
    model_config, codebook_size = base_of(pipe.model).config, pipe.image_tokenizer.codebook_size
    context = Context(Accelerator(), config, pipe.image_tokenizer, pipe.text_tokenizer, model_config)
    rows = open_data(context).rows
    train, validation = rows["train"], rows["validation"]

    def validation_loss() -> float:
        device = torch.device("cpu")
        return image_loss(pipe.model, validation, pipe.text_tokenizer, model_config, config.batch_size, device)

    losses = {"untrained": validation_loss(), "code_frequencies": code_entropy(train, validation, codebook_size)}
    pipe.load_lora_weights(run / "lora")
    losses["adapter"] = validation_loss()
    text, promises = text_metrics(pipe, backbone, expect)
    log = read_log(run)
    result = {
        "validation_image_loss": losses,
        "text": text,
        "steps": log[-1]["step"],
        "seconds": round(seconds_of(log, config), 1),
        "promises": {
            "the adapter predicts codes better than the untrained start": losses["adapter"] < losses["untrained"],
            "the adapter predicts codes better than their frequencies": losses["adapter"] < losses["code_frequencies"],
            **promises,
        },
    }
    (run / "report.json").write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n")
    plot_loss(log, run / "loss.png", f"LoRA on {Path(backbone).name}: loss against cost", codebook_size)
    captions = sorted(set(train["caption"]))
    sample_sheet(
        pipe, choose_evenly(captions, min(16, len(captions)), 0), guidance_scale, temperature, run / "samples.png"
    )
    return result


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line, report, and exit with 1 and the broken promises, if any."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="output_dir of the run")
    parser.add_argument("--backbone", required=True, help="model.backbone of the run")
    parser.add_argument("--guidance-scale", type=float, default=1.5, help="for the samples (default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=0.5, help="for the samples (default: %(default)s)")
    parser.add_argument(
        "--expect", default="Paris", help=f"text that the answer to {QUESTION!r} contains (default: %(default)s)"
    )
    args = parser.parse_args(argv)
    if not (args.run / "config.yaml").is_file():
        raise ValueError(f"run: {str(args.run)!r} has no config.yaml; give the output_dir of a finished run.")
    result = report(args.run, args.backbone, args.guidance_scale, args.temperature, args.expect)
    print(json.dumps(result, indent=2, ensure_ascii=False))
    broken = [promise for promise, kept in result["promises"].items() if not kept]
    if broken:
        sys.exit(f"broken: {'; '.join(broken)}")


if __name__ == "__main__":
    explain_errors(main)

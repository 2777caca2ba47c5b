"""Throughput of a run: FLOPs of its batches, and the share of a device's peak that they are (MFU, arXiv 2204.02311)."""

import torch
from accelerate import Accelerator

from unified.config import UnifiedConfig
from unified.prediction.arrange import Batch
from unified.prediction.schedule import training_flops

# FLOP/s of dense bf16 and fp16 matrix products, from the makers' data sheets; the first name that a device's begins with.
PEAKS = {
    "NVIDIA A100": 312e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200 NVL": 835e12,
    "NVIDIA H200": 989e12,
    "NVIDIA L40S": 362e12,
    "NVIDIA L40": 181e12,
    "NVIDIA L4": 121e12,
    "NVIDIA B200": 2250e12,
}


def peak_flops(accelerator: Accelerator, given: float | None) -> float | None:
    """FLOP/s of one device at its best: ``given``, or that of a known GPU in bf16 or fp16; None if it is not known."""
    if given is not None or accelerator.device.type != "cuda" or accelerator.mixed_precision not in ("bf16", "fp16"):
        return given
    return peak_of(torch.cuda.get_device_name(accelerator.device))


def peak_of(name: str) -> float | None:
    """FLOP/s of a GPU by its name; None if it is not known."""
    return next((peak for known, peak in PEAKS.items() if name.startswith(known)), None)


def batch_flops(config: UnifiedConfig, batch: Batch, frozen: bool = False) -> float:
    """FLOPs of a training step on a batch, padding and recomputed activations not counted.

    With a ``frozen`` base 4 of 6, as its weights have no gradients; the adapter itself is left out.
    """
    counts, inputs = batch.counts, batch.inputs
    documents = inputs.get("document_ids")
    if documents is None:
        squares = counts.positions**2 / len(inputs["input_ids"])  # rows of about the same length
    else:
        squares = sum(float(row[row >= 0].bincount().square().sum()) for row in documents)
    codes = inputs["labels"].shape[-1] if inputs.get("merge") == "channel" else 1
    scored, text = len(inputs["image_targets"]) * codes, config.text_config
    flops = training_flops(config, counts.positions, 0, scored, squares)
    flops += 6.0 * counts.text_targets * text.hidden_size * text.vocab_size
    return flops * (4 / 6 if frozen else 1)

"""Throughput in the log: tokens, images, and the share of a device's peak."""

from types import SimpleNamespace

import pytest
import torch
from conftest import tiny_model
from torch.utils.flop_counter import FlopCounterMode

from unified.data.batches import make_batch
from unified.sequence import ImageSegment, TextSegment, build_sequence
from unified.training.config import load_config
from unified.training.loop import train
from unified.training.throughput import batch_flops, peak_flops, peak_of
from unified.training.tracking import read_log


def counted_flops(model, batch):
    """FLOPs that torch counts in a step, with the products of attention made visible by eager attention."""
    with FlopCounterMode(display=False) as counter:
        model(**batch.inputs).loss.backward()
    return counter.get_total_flops()


def sequences(model, images):
    vocabulary = model.config.vocabulary
    return [
        build_sequence([TextSegment([5] * 10), ImageSegment(torch.arange(16).reshape(4, 4))], vocabulary)
        for _ in range(images)
    ]


@pytest.mark.parametrize("pack", [None, 60])
def test_flops_are_those_that_torch_counts(pack):
    """Where all of attention's square is computed, of which a causal model needs half; a packed row, more in vain."""
    model = tiny_model(attn_implementation="eager").train()
    batch = make_batch(sequences(model, 2), model.config, None, pack)
    rows, length = batch.inputs["input_ids"].shape
    width, layers = 32, 2
    computed = 6 * layers * 2 * width * rows * (length - 1) ** 2
    per_document = batch.counts.positions // 2
    needed = 6 * layers * width * 2 * per_document**2
    last = rows * 6 * layers * (4 * width * width + 3 * width * 64)  # the last position of a row is not run
    expected = batch_flops(model.config, batch) - needed + computed - last
    assert counted_flops(model, batch) == pytest.approx(expected, rel=0.02)
    assert batch_flops(model.config, batch, frozen=True) == pytest.approx(batch_flops(model.config, batch) * 2 / 3)


@pytest.mark.parametrize(
    ("name", "peak"),
    [("NVIDIA A100-SXM4-80GB", 312e12), ("NVIDIA H100 PCIe", 756e12), ("NVIDIA H100 80GB HBM3", 989e12),
     ("NVIDIA L4", 121e12), ("NVIDIA L40", 181e12), ("NVIDIA L40S", 362e12), ("NVIDIA H200 NVL", 835e12),
     ("NVIDIA H200", 989e12), ("NVIDIA GeForce GTX 1080", None)],
)  # fmt: skip
def test_a_device_is_known_by_its_name(name, peak):
    assert peak_of(name) == peak


def test_a_peak_is_that_of_the_precision(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100-SXM4-80GB")
    accelerator = SimpleNamespace(device=torch.device("cuda"), mixed_precision="bf16")
    assert peak_flops(accelerator, None) == 312e12 and peak_flops(accelerator, 5.0) == 5.0
    accelerator.mixed_precision = "no"
    assert peak_flops(accelerator, None) is None


def test_the_log_says_how_fast_a_run_is(config_file, tmp_path, capsys):
    options = ["steps=4", "log_every=2", "validate_every=null", "checkpoint_every=null", "schedule.levels=1"]
    train(load_config(config_file, [f"output_dir={tmp_path}/a", *options]))
    assert "peak_flops=" in capsys.readouterr().out
    first, second = read_log(tmp_path / "a")
    assert "mfu" not in first
    seconds = (second["positions"] - first["positions"]) / second["tokens_per_second"]
    assert second["images_per_second"] == pytest.approx(2 * 4 / seconds)

    train(load_config(config_file, [f"output_dir={tmp_path}/b", *options, "peak_flops=1e9"]))
    assert "peak_flops=" not in capsys.readouterr().out
    for before, record in zip([{"positions": 0}, *read_log(tmp_path / "b")], read_log(tmp_path / "b"), strict=False):
        seconds = (record["positions"] - before["positions"]) / record["tokens_per_second"]
        per_step = record["mfu"] * 1e9 * seconds / 2
        assert 1e7 < per_step < 1e8  # 4 images of 16 codes in a model of 40,000 weights

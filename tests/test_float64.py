"""Devices without float64, such as MPS, are never asked for it."""

import re
from pathlib import Path

import pytest
import torch
from conftest import generators
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from unified.decoding import sampling
from unified.decoding.sampling import gumbel_noise

ROOT = Path(__file__).resolve().parent.parent


class NoFloat64(TorchDispatchMode):
    """Makes the device ``meta`` one that refuses float64, as MPS does."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, torch.Tensor) and value.device.type == "meta" and value.dtype == torch.float64:
                raise TypeError("this device has no float64")
        return result


def test_noise_on_a_device_without_float64(monkeypatch):
    device = torch.device("meta")
    with NoFloat64():
        with pytest.raises(TypeError, match="no float64"):
            gumbel_noise(generators(0), 8, device)
        monkeypatch.setattr(sampling, "NO_FLOAT64", {"meta"})
        noise = gumbel_noise(generators(0, 1), 8, device)
    assert noise.device == device and noise.dtype == torch.float32 and noise.shape == (2, 8)


def test_noise_of_a_generator_without_float64(monkeypatch):
    """The same distribution, from two float32 numbers each: mean 0.5772, variance pi^2 / 6."""
    monkeypatch.setattr(sampling, "NO_FLOAT64", {"cpu"})
    noise = gumbel_noise(generators(0, 0), 200_000, torch.device("cpu"))
    assert torch.equal(noise[0], noise[1])
    assert float(noise[0].mean()) == pytest.approx(0.5772, abs=0.015)
    assert float(noise[0].var()) == pytest.approx(1.6449, abs=0.04)


def test_numbers_leave_their_device_before_they_become_float64():
    for folder in ("unified", "eval", "tokenizers"):
        for file in (ROOT / folder).rglob("*.py"):
            assert not re.search(r"\.double\(\)\.(cpu|to)\(|\.to\(torch\.float64\)\.cpu\(", file.read_text()), file

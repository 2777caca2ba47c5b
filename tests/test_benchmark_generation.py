"""The benchmark of generation runs, refuses to time unequal codes, and knows how far 8-bit weights are off."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "eval"))


def test_it_runs(tmp_path):
    command = [sys.executable, ROOT / "eval" / "benchmark_generation.py", "--rounds", "1", "--grid", "4", "--codebook", "64",
               "--json", tmp_path / "out.json"]  # fmt: skip
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads((tmp_path / "out.json").read_text())
    assert set(result["goals"]) == {"G1", "G5"}
    for goal in result["goals"].values():
        assert goal["spread"][0] == goal["ratio"] == goal["spread"][1] > 0 and goal["goal"] > 1
    assert result["conditions"]["threads"] == 1


def test_unequal_codes_are_not_timed():
    from benchmark_generation import check_equal

    check_equal("same", torch.tensor([1, 2]), torch.tensor([1, 2]))
    with pytest.raises(RuntimeError, match="peer: 1 of 2 greedy codes differ"):
        check_equal("peer", torch.tensor([1, 2]), torch.tensor([1, 3]))


def test_int8_moves_distributions_a_little():
    from benchmark_generation import NOTHING, SAMPLING, START, int8_quality
    from benchmark_training import our_model

    quality = int8_quality(our_model(64, width=64, layers=2, grid=4).eval(), [START, NOTHING], (4, 4), SAMPLING)
    assert 0 < quality["kl_nats_per_code"] < 0.05


def test_a_wrong_checkout_is_named(tmp_path):
    from benchmark_generation import load_llamagen

    with pytest.raises(ValueError, match=r"llamagen: .* has no autoregressive/models/generate.py"):
        load_llamagen(str(tmp_path), 64, 2, 1, 64, 4)

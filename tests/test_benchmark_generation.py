"""The benchmark of generation runs, refuses to time unequal codes, and knows how far 8-bit weights are off."""

import json
import sys
from pathlib import Path

import pytest
import torch
from conftest import full_forward
from forking import python
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "eval"))


@pytest.mark.process
def test_it_runs(tmp_path):
    options = ["--rounds", 1, "--grid", 4, "--codebook", 64, "--json", tmp_path / "out.json"]
    done = python("eval/benchmark_generation.py", *options)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads((tmp_path / "out.json").read_text())
    assert set(result["goals"]) == {"G1", "G5", "N1", "N1_batch16", "N3", "N3_batch16"}
    for goal in result["goals"].values():
        for timing in (goal, goal["cpu"]):
            assert timing["spread"][0] == timing["ratio"] == timing["spread"][1] > 0
        assert goal["goal"] > 1
    assert {"batch 4 against transformers", "batch 16 against transformers"} <= set(result["others"])
    assert result["conditions"]["threads"] == 1


def test_unequal_codes_are_not_timed():
    from benchmark_generation import check_equal

    check_equal("same", torch.tensor([1, 2]), torch.tensor([1, 2]))
    with pytest.raises(RuntimeError, match="peer: 1 of 2 codes differ"):
        check_equal("peer", torch.tensor([1, 2]), torch.tensor([1, 3]))


@torch.no_grad()
def test_codes_are_replayed_without_cache_before_any_timing():
    from benchmark_generation import SAMPLING, check_against_full_forward, ours
    from benchmark_training import our_model
    from unified.decoding import make_decoder

    model = our_model(64, width=64, layers=2, grid=4).eval()
    codes = ours(make_decoder(model), 4)().clone()
    check_against_full_forward(model, codes, SAMPLING)
    codes[0, 2, 1] = (codes[0, 2, 1] + 1) % 64
    with pytest.raises(RuntimeError, match=r"a loop without cache: .* of 16 codes differ"):
        check_against_full_forward(model, codes, SAMPLING)


def test_logits_along_a_image_are_those_of_a_full_forward():
    from benchmark_generation import NOTHING, START, guided_logits_along
    from benchmark_training import our_model
    from unified.decoding import Sampling, make_decoder

    model = our_model(64, width=64, layers=2, grid=4).eval()
    codes = torch.arange(16).reshape(1, 4, 4)
    sampling = Sampling(guidance_scale=3.0, guidance_schedule="linear")
    found = guided_logits_along(make_decoder(model), [START, NOTHING], codes, sampling)
    with torch.no_grad():
        sides = [
            full_forward(model, [*ids, *range(4, 20)], [(4, 4)]).image_logits[0, len(ids) - 1 : -1]
            for ids in (START, NOTHING)
        ]
    scales = torch.linspace(1, 3, 16)[:, None]
    torch.testing.assert_close(found, sides[1] + scales * (sides[0] - sides[1]), rtol=1e-4, atol=1e-4)


@pytest.mark.process
def test_sweep_compares_with_its_first_grid():
    from benchmark_generation import sweep

    first, second = sweep(1, (2, 4))
    assert first == {"grid": 2, "time_per_code": 1.0} and second["grid"] == 4 and second["time_per_code"] > 0


def test_int8_moves_distributions_a_little():
    from benchmark_generation import NOTHING, SAMPLING, START, int8_quality
    from benchmark_training import our_model

    quality = int8_quality(our_model(64, width=64, layers=2, grid=4).eval(), [START, NOTHING], (4, 4), SAMPLING)
    assert 0 < quality["kl_nats_per_code"] < 0.05


def test_a_wrong_checkout_is_named(tmp_path):
    from benchmark_peers import load_llamagen

    with pytest.raises(ValueError, match=r"llamagen: .* has no autoregressive/models/generate.py"):
        load_llamagen(str(tmp_path), 64, 2, 1, 64, 4)


@pytest.mark.process
def test_trained_pipeline_is_measured_in_every_mode(pipeline, tmp_path):
    """Codes a pass are at least those of plain decoding, and as many as there are where one pass settles all."""
    from benchmark_generation import EXACT, MODES, measure_trained

    pipeline.save_pretrained(tmp_path / "pipeline")
    result = measure_trained(str(tmp_path / "pipeline"), 1, None, tmp_path / "modes.png")
    modes = result["modes against plain"]
    assert set(modes) == {f"{m} {w}" for m in MODES for w in (8, 16)} | {"gsd 8 int8", "gsd 16 int8"}
    assert all(1 <= metrics["codes_per_pass"] <= 4 * 16 for metrics in modes.values())
    assert set(result["goals"]) == {"G4"} and result["goals"]["G4"]["codes_per_pass"] == modes[EXACT]["codes_per_pass"]
    assert 0 <= result["int8 quality"]["kl_nats_per_code"] < 0.05
    with Image.open(tmp_path / "modes.png") as sheet:
        assert sheet.height > 6 * 16 and len(sheet.getcolors(2**20) or []) > 10

"""Direct preference optimisation: the loss against an enumerated reference, and pairs from a table to an adapter."""

import copy
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_model
from PIL import Image
from test_cca import adapter_run, micro_batch, naive_log_prob
from test_next_x import image
from test_objectives import adapted

from unified import UnifiedPipeline
from unified.data.pairs import encode_pairs
from unified.prediction.merge import patches
from unified.sequence import ImageSegment, TextSegment, build_sequence
from unified.training.config import load_config
from unified.training.loop import train
from unified.training.objectives.dpo import DPO
from unified.training.tracking import read_log
from unified_tokenizers import VQConfig, VQModel


def pairs_for(model, count=2, grid=(4, 4)):
    rows = []
    for number in range(count):
        text = TextSegment(list(range(5, 7 + number)), loss=False)
        row, row.rejected = (
            build_sequence([text, ImageSegment(image(10 * number + side, grid))], model.config.vocabulary)
            for side in (0, 1)
        )
        row.seed = number
        rows.append(row)
    return rows


def test_the_loss_is_that_of_the_paper():
    """Enumerated pair by pair, with a copy of the model from before as reference; a row of text counts nothing."""
    model = tiny_model()
    reference, policy = copy.deepcopy(model), adapted(model)
    rows = pairs_for(policy.get_base_model())
    text = build_sequence([TextSegment([5, 6])], policy.get_base_model().config.vocabulary)
    objective = DPO(beta=0.2)
    given, further = micro_batch(objective, policy, [rows[0], text, rows[1]])
    assert objective.count(given.batch) == 2 and torch.equal(further[2].input_ids, rows[1].rejected.input_ids)
    term = objective.loss(given, 2.0)
    term.loss.backward()
    found = {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}
    assert found and all("lora_" in name or "modules_to_save" in name for name in found)
    policy.zero_grad()
    gains = [
        [naive_log_prob(policy, side) - naive_log_prob(reference, side).detach() for side in (row, row.rejected)]
        for row in rows
    ]
    margins = torch.stack([won - lost for won, lost in gains])
    naive = -F.logsigmoid(0.2 * margins).mean()
    torch.testing.assert_close(term.loss, naive, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(term.metrics["margin"], margins.sum(), rtol=1e-4, atol=1e-3)
    naive.backward()
    for name, parameter in policy.named_parameters():
        if name in found:
            torch.testing.assert_close(found[name], parameter.grad, rtol=1e-3, atol=1e-5)


@pytest.mark.process
@pytest.mark.parametrize("way", [{"order": "random"}, {"order": "diagonals", "merge": "channel"}], ids=str)
def test_packing_and_patches_change_no_margin(way):
    """In any order both images of a pair come in one permutation, so equal images differ by nothing."""
    policy = adapted(tiny_model(prediction=way, image_grids=[[4, 8]]))
    rows = pairs_for(policy.get_base_model(), 3, (4, 8))
    rows[1].rejected = copy.deepcopy(rows[1])
    rows[1].rejected.seed = 99
    objective = DPO()
    with torch.no_grad():
        for merge in (None, patches(2)):
            losses = []
            for pack in (None, 180):
                given, _ = micro_batch(objective, policy, rows, merge, pack)
                losses.append(objective.loss(given, 3.0))
            torch.testing.assert_close(losses[0], losses[1], rtol=1e-4, atol=1e-4)
            same, _ = micro_batch(objective, policy, rows[1:2], merge)
            assert objective.loss(same, 1.0).loss == pytest.approx(np.log(2), abs=1e-5)


@pytest.fixture(scope="module")
def pair_table(tmp_path_factory):
    """Eight captions, each with a dark image that is preferred to a bright one, and two rows that cannot be used."""
    folder, rng = tmp_path_factory.mktemp("pairs"), np.random.default_rng(0)
    lines = []
    for number in range(8):
        for name, level in (("dark", 40), ("bright", 210)):
            pixels = np.clip(rng.normal(level, 20, (16, 16, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"{name}-{number}.png")
        lines.append(
            {"caption": f"cat number {number}", "chosen": f"dark-{number}.png", "rejected": f"bright-{number}.png"}
        )
    lines += [{**lines[0], "caption": ""}, {**lines[0], "rejected": None}]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder / "pairs.jsonl"


@pytest.mark.process
def test_from_a_table_of_pairs_to_an_adapter(pipeline, config_file, pair_table, tmp_path, capsys):
    """The margin grows over the steps; unusable rows are reported; the adapter is sampled as its base is."""
    sources = f"data.sources=[{{path: {pair_table}, kind: pairs}}]"
    folder = train(adapter_run(
        pipeline, config_file, tmp_path, "data.train=null", sources, "data.image_size=16", "steps=10",
        "optimizer.learning_rate=0.02", "objectives=[{name: dpo}]",
    ))  # fmt: skip
    assert "8 rows used, 1 corrupt images, 1 empty captions" in capsys.readouterr().out
    log = [line for line in read_log(tmp_path / "run") if "dpo_loss" in line]
    assert log[0]["dpo_loss"] == pytest.approx(np.log(2), rel=1e-4)
    assert log[-1]["dpo_loss"] < 0.4 and log[-1]["dpo_accuracy"] == 1.0 and log[-1]["dpo_margin"] > 3
    pipe = UnifiedPipeline.from_pretrained(tmp_path / "base")
    pipe.load_lora_weights(folder)
    assert dict(pipe.sampling) == {}


def test_pairs_of_another_tokenizer_and_other_misuse(pipeline, config_file, pair_table, tmp_path):
    torch.manual_seed(5)
    other = VQModel(VQConfig(channels=8, encoder_blocks=1, decoder_blocks=1, codebook_size=20, code_dim=4)).eval()
    encode_pairs(other, str(pair_table), tmp_path / "codes", size=(16, 16))
    sources = f"data.sources=[{{path: {tmp_path}/codes, kind: pairs}}]"
    config = adapter_run(pipeline, config_file, tmp_path, "data.train=null", sources, "objectives=[{name: dpo}]")
    with pytest.raises(ValueError, match=r"was made with tokenizer .* encode the images again"):
        train(config)
    with pytest.raises(ValueError, match=r"objectives: dpo needs pairs; name them as data\.sources="):
        load_config(config_file, [f"output_dir={tmp_path}", "objectives=[{name: dpo}]", "lora.rank=4"])
    with pytest.raises(ValueError, match="must be three columns"):
        encode_pairs(other, str(pair_table), tmp_path / "x", columns=("chosen", "chosen", "caption"))
    with pytest.raises(ValueError, match="image_column: 'best' is not a column"):
        encode_pairs(other, str(pair_table), tmp_path / "x", columns=("chosen", "best", "caption"))

"""The report of a LoRA run on a language model: its metrics, and what it does when a promise is broken."""

import json
import math
import shutil
import sys

import datasets
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import smollm2_report as recipe
from unified.training.config import load_config
from unified.training.loop import train
from unified.training.tracking import read_log


@pytest.fixture(scope="module")
def learned_run(config_file, on_a_backbone, parts, tmp_path_factory):
    """An adapter that has learned its few images, which are also its validation rows."""
    run = tmp_path_factory.mktemp("smollm2")
    options = ["steps=40", "batch_size=12", "log_every=4", "validate_every=20", "checkpoint_every=null", "lora.rank=4",
               "lora.train_image_tables=true", "optimizer.ema_decay=null", "optimizer.learning_rate=0.02",
               "schedule.patch_sizes=[1]", "schedule.shares=[1.0]", "data.validation_split=train"]  # fmt: skip
    train(load_config(config_file, [f"output_dir={run}", *on_a_backbone, *options]))
    return run


def main(monkeypatch, run, backbone, expect=""):
    arguments = ["--run", str(run), "--backbone", str(backbone), "--expect", expect]
    monkeypatch.setattr(sys, "argv", ["smollm2_report.py", *arguments])
    recipe.main()


def test_entropy_by_hand():
    train_rows, validation = (
        datasets.Dataset.from_dict({"codes": codes}).with_format("numpy")
        for codes in ([[0, 0], [2, 0]], [[0, 1], [3, 2]])
    )
    # Add-one counts over 4 codes: 4, 1, 2, 1 of 8.
    expected = -(math.log(4 / 8) + math.log(1 / 8) + math.log(1 / 8) + math.log(2 / 8)) / 4
    assert recipe.code_entropy(train_rows, validation, 4) == pytest.approx(expected)


def test_perplexity_by_hand():
    logits = torch.tensor([[[0.0, math.log(3)], [0.0, 0.0], [9.0, 0.0]]])  # 1/4, 3/4, then 1/2, 1/2
    assert recipe.perplexity(logits, torch.tensor([[0, 1, 0]])) == pytest.approx((4 / 3 * 2) ** 0.5)


@pytest.mark.process
def test_kept_promises(learned_run, transformers_backbone, monkeypatch, capsys):
    main(monkeypatch, learned_run, transformers_backbone)
    result = json.loads((learned_run / "report.json").read_text())
    assert result == json.loads(capsys.readouterr().out)
    assert len(result["promises"]) == 5 and all(result["promises"].values())
    log = read_log(learned_run)
    losses = result["validation_image_loss"]
    assert losses["adapter"] == pytest.approx(log[-1]["validation_loss"], rel=1e-5)
    text = json.loads((learned_run / "base" / "model" / "config.json").read_text())["text_config"]
    spread = text["hidden_size"] * text["initializer_range"] ** 2  # variance of a random head's scores of normed states
    assert losses["untrained"] == pytest.approx(math.log(20) + spread / 2, abs=0.4)
    speeds = [record["images_per_second"] for record in log if "images_per_second" in record]
    assert result["steps"] == 40 and len(speeds) == 10
    assert result["seconds"] == pytest.approx(np.sum(48 / np.array(speeds)), abs=0.06)
    perplexities = result["text"]["perplexity"]
    assert perplexities["adapter_off"] == perplexities["backbone"] != perplexities["adapter_on"]
    assert all((learned_run / name).stat().st_size > 5000 for name in ("loss.png", "samples.png"))


def test_answer_is_the_models_own(transformers_backbone, word_tokenizer):
    model = AutoModelForCausalLM.from_pretrained(transformers_backbone).eval()
    ids = word_tokenizer("red apple", return_tensors="pt").input_ids
    answer = recipe.answer_ids(model, word_tokenizer, "red apple")
    step = model(ids).logits[0, -1].argmax()
    assert answer[0] == step and len(answer) <= 12


@pytest.mark.process
def test_another_backbone_is_a_broken_promise(learned_run, transformers_backbone, tmp_path, monkeypatch):
    shutil.copytree(transformers_backbone, tmp_path / "other")
    weights = load_file(tmp_path / "other" / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    weights[name] = weights[name] * 1.0001
    save_file(weights, tmp_path / "other" / "model.safetensors", {"format": "pt"})
    with pytest.raises(SystemExit, match=r"^broken: adapter off: the backbone's text logits"):
        main(monkeypatch, learned_run, tmp_path / "other")
    with pytest.raises(SystemExit, match=r"^broken: adapter off: the answer contains 'Paris'$"):
        main(monkeypatch, learned_run, transformers_backbone, expect="Paris")


@pytest.mark.process
def test_an_adapter_that_learned_nothing_is_named(learned_run, transformers_backbone, tmp_path, monkeypatch):
    shutil.copytree(learned_run, tmp_path / "run")
    file = tmp_path / "run" / "lora" / "adapter_model.safetensors"
    weights = load_file(file)
    weights = {name: torch.zeros_like(w) if "image_head" in name else w for name, w in weights.items()}
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(SystemExit, match=r"^broken: .*the adapter predicts codes better than their frequencies"):
        main(monkeypatch, tmp_path / "run", transformers_backbone)
    assert json.loads((tmp_path / "run" / "report.json").read_text())["validation_image_loss"][
        "adapter"
    ] == pytest.approx(math.log(20), rel=1e-5)

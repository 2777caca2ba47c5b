"""The tokenizer recipe: its options, its resume, its errors."""

import json
import sys

import pytest
import torch
from omegaconf import OmegaConf

import train_tokenizer
from unified_tokenizers import VQGAN, AutoImageTokenizer, VQGANConfig

ALL = ["perceptual=edges", "discriminator={start: 6, channels: 8}", "ema_decay=0.9"]


@pytest.fixture
def run(tmp_path, picture_source, monkeypatch):
    def start(name, *overrides, model=None):
        config = {
            "output_dir": str(tmp_path / name), "sources": [picture_source], "image_size": 16, "steps": 16, "batch_size": 4,
            "shift": 2, "validate_every": 8,
            "model": {"channels": 8, "encoder_blocks": 1, "decoder_blocks": 1, "codebook_size": 16, "code_dim": 4} | (model or {}),
        }  # fmt: skip
        if model is False:
            del config["model"]
        OmegaConf.save(config, tmp_path / "config.yaml")
        monkeypatch.setattr(sys, "argv", ["train_tokenizer.py", "--config", str(tmp_path / "config.yaml"), *overrides])
        train_tokenizer.main()
        return tmp_path / name

    return start


def weights(folder):
    return AutoImageTokenizer.from_pretrained(folder).state_dict()


def same(a, b):
    return all(torch.equal(value, b[name]) for name, value in a.items())


def test_resume_continues_bit_exactly(run):
    whole = run("whole", *ALL, "checkpoint_every=8")
    resumed = run("resumed", *ALL, "checkpoint_every=8", f"resume={whole}/checkpoints/step-00000008")
    assert same(weights(whole), weights(resumed))
    log = json.loads((whole / "training_log.json").read_text())
    assert [record["step"] for record in log] == [8, 16]
    assert all("discriminator_loss" in record and 1 <= record["perplexity"] <= 16 for record in log)
    again = run("whole", *ALL, "checkpoint_every=8", "steps=16", "resume=latest")
    assert json.loads((again / "training_log.json").read_text())[-1]["step"] == 16


@pytest.mark.parametrize("option", ALL)
def test_every_option_changes_the_result(run, option):
    assert not same(weights(run("plain")), weights(run("changed", option)))


@pytest.mark.parametrize(
    "model",
    [{"quantizer": "lfq"}, {"quantizer": "fsq", "fsq_levels": [4, 4]}, {"downsample": 8}, {"downsample": 16}],
)
def test_quantizers_and_strides(run, model):
    log = json.loads(
        (
            run("out", "learning_rate=5e-3", "steps=48", "validate_every=16", model=model) / "training_log.json"
        ).read_text()
    )
    assert log[-1]["psnr_db"] > log[0]["psnr_db"]
    assert 0 < log[-1]["codes_used"] <= 1


def test_published_weights_can_be_trained_on(run, tmp_path):
    torch.manual_seed(0)
    VQGAN(VQGANConfig(channels=32, multipliers=[1, 1], residual_blocks=1, attention_levels=[], latent_channels=8,
                      codebook_size=16, code_dim=4)).save_pretrained(tmp_path / "start")  # fmt: skip
    options = ["steps=4", "discriminator={start: 1, channels: 8}"]
    folder = run("tuned", f"init_from={tmp_path / 'start'}", *options, model=False)
    assert isinstance(AutoImageTokenizer.from_pretrained(folder), VQGAN)
    assert not same(weights(tmp_path / "start"), weights(folder))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["image_size=18"], "image_size: 18 does not divide by the tokenizer's stride 4"),
        (["perceptual=lpips"], "'lpips' needs two files"),
        (["discriminator={start: 16}"], "discriminator.start: 16 lies outside the 16 steps"),
        (["discriminator={weight: 1}"], "'discriminator.start'"),
        (["ema_decay=1.0"], "ema_decay: 1.0 must lie in"),
        (["resume=latest"], "resume: no checkpoint in"),
        (["init_from=somewhere"], "model: given together with init_from"),
        (["lerning_rate=1"], "lerning_rate"),
    ],
)
def test_bad_settings_are_named(run, overrides, message):
    with pytest.raises(ValueError, match=message):
        run("bad", *overrides)

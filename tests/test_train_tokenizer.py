"""The tokenizer recipe: its options, its resume, its errors."""

import sys

import datasets
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

import train_tokenizer
from unified.data import load_source
from unified.data.images import Images
from unified.data.rows import undecoded_rows
from unified.training.tracking import read_log
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


@pytest.mark.process
def test_resume_continues_bit_exactly(run):
    whole = run("whole", *ALL, "checkpoint_every=8")
    resumed = run("resumed", *ALL, "checkpoint_every=8", f"resume={whole}/checkpoints/step-00000008")
    assert same(weights(whole), weights(resumed))
    log = read_log(whole)
    assert [record["step"] for record in log] == [8, 16]
    assert all("discriminator_loss" in record and 1 <= record["perplexity"] <= 16 for record in log)
    again = run("whole", *ALL, "checkpoint_every=8", "steps=16", "resume=latest")
    assert read_log(again)[-1]["step"] == 16


@pytest.mark.process
@pytest.mark.parametrize("option", ALL)
def test_every_option_changes_the_result(run, option):
    assert not same(weights(run("plain")), weights(run("changed", option)))


@pytest.mark.process
@pytest.mark.parametrize(
    "model",
    [{"quantizer": "lfq"}, {"quantizer": "fsq", "fsq_levels": [4, 4]}, {"downsample": 8}, {"downsample": 16}],
)
def test_quantizers_and_strides(run, model):
    log = read_log(run("out", "learning_rate=5e-3", "steps=48", "validate_every=16", model=model))
    assert log[-1]["psnr_db"] > log[0]["psnr_db"]
    assert 0 < log[-1]["codes_used"] <= 1


@pytest.mark.process
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


class TestImages:
    def test_captions_are_not_needed(self, run, tmp_path):
        for number in range(4):
            Image.new("RGB", (16, 16), (60 * number, 0, 0)).save(tmp_path / f"{number}.png")
        sources = [f"sources=[{tmp_path}]", "validation_split=train"]
        assert read_log(run("bare", *sources, "steps=2", "validate_every=1"))[-1]["step"] == 2

    @pytest.mark.process
    def test_images_that_are_read_again_train_the_same(self, run):
        """Above ``cache_gb`` nothing is kept; the result is the same bit for bit."""
        kept, read = run("kept"), run("read", "cache_gb=0")
        assert same(weights(kept), weights(read)) and read_log(kept) == read_log(read)

    def test_memory_holds_one_batch(self, picture_source):
        images = Images(rows_of([picture_source] * 3), "image", 16, cache_gb=0)
        assert images.pixels is None and len(images) == 36
        assert images[torch.tensor([0, 13, 0])].shape == (3, 3, 16, 16)
        cached = Images(rows_of([picture_source]), "image", 16, cache_gb=1)
        numbers = torch.arange(12)
        assert torch.equal(images[numbers], cached[numbers]) and torch.equal(images[numbers + 12], cached.pixels)

    @pytest.mark.parametrize("cache_gb", [0, 1])
    def test_damaged_images_are_named_and_replaced(self, cache_gb, tmp_path):
        for number in range(5):
            Image.new("RGB", (8, 8), (50 * number, 0, 0)).save(tmp_path / f"{number}.png")
        for number in (1, 4):
            (tmp_path / f"{number}.png").write_bytes(b"damaged")
        images = Images(rows_of([str(tmp_path)]), "image", 8, cache_gb)
        reds = [int(red) for red in images[torch.arange(len(images))][:, 0, 0, 0]]
        assert reds == ([0, 100, 150] if cache_gb else [0, 100, 100, 150, 0])
        assert images.report.corrupt_image == 2 and f"{tmp_path}/4.png" in images.summary()
        for file in tmp_path.glob("*.png"):
            file.write_bytes(b"damaged")
        with pytest.raises(ValueError, match=r"sources: no image can be read: [\s\S]*0\.png"):
            Images(rows_of([str(tmp_path)]), "image", 8, cache_gb)[torch.tensor([0])]

    @pytest.mark.process
    def test_resume_notices_other_images(self, run, tmp_path):
        for number in range(4):
            Image.new("RGB", (16, 16), (60 * number, 0, 0)).save(tmp_path / f"{number}.png")
        sources = [f"sources=[{tmp_path}]", "validation_split=train", "checkpoint_every=8"]
        folder = run("bare", *sources)
        Image.new("RGB", (16, 16), "blue").save(tmp_path / "0.png")
        with pytest.raises(ValueError, match="the inputs differ"):
            run("bare", *sources, f"resume={folder}/checkpoints/step-00000008")
        run("bare", *sources, f"resume={folder}/checkpoints/step-00000008", "allow_changes=true")

    def test_settings_are_checked_before_images_are_read(self, run, monkeypatch):
        monkeypatch.setattr(train_tokenizer, "open_images", lambda *_: pytest.fail("read images first"))
        with pytest.raises(ValueError, match="image_size: 18"):
            run("bad", "image_size=18")


def rows_of(sources):
    rows = [undecoded_rows(load_source(source), "image", None).select_columns(["image"]) for source in sources]
    return datasets.concatenate_datasets(rows)

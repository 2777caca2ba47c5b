"""A style from a folder of images: recipes/configs/style_lora.yaml on ten tiny ones."""

import numpy as np
import pytest
import torch
from conftest import ROOT, generators
from PIL import Image

from unified import UnifiedPipeline
from unified.data.code_cache import load_codes
from unified.training.config import load_config
from unified.training.loop import train
from unified.training.tracking import read_log

CONFIG = ROOT / "recipes" / "configs" / "style_lora.yaml"


@pytest.fixture
def folder(tmp_path):
    """Ten stripes of 20 x 24 px."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(10):
        pixels = np.zeros((20, 24, 3), np.uint8)
        pixels[:, number::3] = (255, 20 * number, 0)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return folder


def run(pipeline, tmp_path, *overrides):
    pipeline.save_pretrained(tmp_path / "base")
    shared = [f"output_dir={tmp_path}/run", f"model.pipeline={tmp_path}/base", "data.image_size=16", "track_with=[]"]
    return train(load_config(CONFIG, [*shared, *overrides]))


@pytest.mark.process
@pytest.mark.parametrize("captions", ["one for all", "beside the images"])
def test_style_from_ten_images(pipeline, folder, tmp_path, captions):
    if captions == "one for all":
        adapter = run(pipeline, tmp_path, f"data.train={folder}", "data.caption=in stripes", "steps=60", "log_every=5")
        expected = ["in stripes"] * 10
    else:
        expected = [f"in {number} stripes" for number in range(10)]
        for number, text in enumerate(expected):
            (folder / f"{number}.txt").write_text(text + "\n")
        adapter = run(pipeline, tmp_path, f"data.train={folder}", "steps=60", "log_every=5")
    rows = load_codes(tmp_path / "run" / "codes", "train", pipeline.image_tokenizer.fingerprint)
    assert list(rows["caption"]) == [caption for caption in expected for _ in range(4 * 2)]  # crops, each mirrored
    first, *_, last = read_log(tmp_path / "run")
    assert last["image_loss"] < 0.8 * first["image_loss"]
    pipe = UnifiedPipeline.from_pretrained(tmp_path / "base")
    pipe.set_progress_bar_config(disable=True)
    before = pipe(expected[0], generator=generators(0), output_type="pt").images[0]
    pipe.load_lora_weights(adapter)
    after = pipe(expected[0], generator=generators(0), output_type="pt").images[0]
    assert not torch.equal(torch.as_tensor(before), torch.as_tensor(after))


@pytest.mark.process
def test_prior_preservation_is_a_second_source(pipeline, folder, parts, tmp_path):
    """Crops and flips are for what the run encodes; codes are taken as they are."""
    sources = f"[{{path: {folder}, caption: in stripes}},{{path: {parts}/codes, weight: 0.5}}]"
    assert (
        run(pipeline, tmp_path, "data.train=null", f"data.sources={sources}", "steps=2", "data.crops=null").name
        == "lora"
    )
    assert len(load_codes(tmp_path / "run" / "codes-0", "train", None)) == 10 * 2
    assert not (tmp_path / "run" / "codes-1").exists()


def test_impossible_sources_are_named(pipeline, folder, parts, tmp_path):
    with pytest.raises(ValueError, match="caption_column: 'caption' is not a column of the source"):
        run(pipeline, tmp_path, f"data.train={folder}")
    with pytest.raises(ValueError, match="holds codes already; crops, flips and caption are for images"):
        run(pipeline, tmp_path, f"data.train={parts}/codes")
    (folder / "0.txt").write_text("stripes")
    with pytest.raises(ValueError, match="caption: the source already has a column 'caption'"):
        run(pipeline, tmp_path, f"data.train={folder}", "data.caption=in stripes")

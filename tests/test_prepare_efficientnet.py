"""EfficientNet-Lite0 as a vision encoder of transformers."""

import numpy as np
import pytest
import torch
from PIL import Image

from prepare_efficientnet import convert, main
from unified.model.vision import load_vision_model
from unified_eval.features import load_efficientnet_lite0, load_extractor


def test_its_features_are_those_that_measure_distances(tmp_path):
    main(["--out", str(tmp_path / "encoder")])
    model, processor, size = load_vision_model(tmp_path / "encoder", "encoder")
    pixels = np.random.default_rng(0).integers(0, 256, (2, *size, 3), dtype=np.uint8)
    images = [Image.fromarray(image) for image in pixels]
    with torch.no_grad():
        states = model(**processor(images, return_tensors="pt"), output_hidden_states=True)
    assert states.hidden_states[-1].shape == (2, 320, 7, 7)
    expected = load_extractor("efficientnet-lite0")(images)
    np.testing.assert_allclose(states.last_hidden_state.mean((2, 3)), expected, rtol=0, atol=2e-4)


def test_other_features_are_not_written(monkeypatch):
    source, _ = load_efficientnet_lite0()
    torch.nn.init.zeros_(source._fc.weight)  # the classifier does not count
    convert(source)
    monkeypatch.setattr(source, "extract_features", lambda images: torch.zeros(len(images), 1280, 7, 7))
    with pytest.raises(ValueError, match="timm computes other features"):
        convert(source)

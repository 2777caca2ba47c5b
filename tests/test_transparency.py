"""Transparent images mean the same everywhere: what is seen on white, as in training."""

import numpy as np
import pytest
import torch
from conftest import generators
from PIL import Image

from unified.cli import main
from unified.pipeline.editing import outpainting_canvas
from unified.serving.uploads import image_and_mask
from unified_tokenizers.images import as_rgb, to_tensor


@pytest.fixture
def pair():
    """An image whose left half is transparent black, and what is seen of it on white."""
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 4), dtype=np.uint8)
    pixels[:, :8], pixels[:, 8:, 3] = 0, 255
    seen = pixels[..., :3].copy()
    seen[:, :8] = 255
    return Image.fromarray(pixels), Image.fromarray(seen)


def test_every_kind_of_transparency():
    palette = Image.new("P", (1, 1), 0)
    palette.putpalette([0, 0, 0, 255, 0, 0])
    palette.info["transparency"] = 0
    keyed = Image.new("RGB", (1, 1))
    keyed.info["transparency"] = (0, 0, 0)
    transparent = [Image.new("RGBA", (1, 1)), Image.new("LA", (1, 1)), palette, keyed]
    assert [as_rgb(image).getpixel((0, 0)) for image in transparent] == [(255, 255, 255)] * 4
    assert as_rgb(Image.new("RGBA", (1, 1), (255, 0, 0, 128))).getpixel((0, 0)) == (255, 127, 127)
    assert [as_rgb(Image.new(mode, (1, 1))).getpixel((0, 0)) for mode in ("RGB", "L", "P", "1")] == [(0, 0, 0)] * 4


def test_the_pipeline_sees_white(pipeline, pair, tmp_path):
    transparent, seen = pair
    assert torch.equal(to_tensor([transparent]), to_tensor([seen]))
    assert outpainting_canvas(transparent, 24, 24)[0].tobytes() == outpainting_canvas(seen, 24, 24)[0].tobytes()
    files = [tmp_path / name for name in ("transparent.png", "seen.png", "layer.png")]
    for image, file in zip((*pair, Image.new("RGBA", (16, 16), "red")), files, strict=True):
        image.save(file)
    shown = [image_and_mask(file, files[2:], (16, 16))[0].tobytes() for file in files[:2]]
    assert shown[0] == shown[1]
    mask = Image.new("L", (16, 16))
    kept = [pipeline.inpaint("red apple", image, mask).codes for image in pair]
    black = pipeline.inpaint("red apple", transparent.convert("RGB"), mask).codes
    assert torch.equal(kept[0], kept[1]) and not torch.equal(kept[0], black)
    texts = [pipeline.caption(image, top_k=1, max_new_tokens=5) for image in pair]
    assert texts[0] == texts[1]


def test_the_command_line_sees_white(pipeline, pair, tmp_path):
    pipeline.save_pretrained(tmp_path / "pipeline")
    Image.new("L", (16, 16)).save(tmp_path / "mask.png")
    written = []
    for name, image in zip(("transparent", "seen"), pair, strict=True):
        image.save(tmp_path / f"{name}.png")
        options = {"pipeline": "pipeline", "out": name, "image": f"{name}.png", "mask": "mask.png"}
        given = [part for key, value in options.items() for part in (f"--{key}", str(tmp_path / value))]
        assert main(["inpaint", "--prompt", "red apple", *given]) == 0
        written.append((tmp_path / name / "000-red-apple.png").read_bytes())
    expected = pipeline.inpaint("red apple", pair[1], Image.new("L", (16, 16)), generator=generators(0)).images[0]
    assert written[0] == written[1]
    assert Image.open(tmp_path / "seen" / "000-red-apple.png").tobytes() == expected.tobytes()

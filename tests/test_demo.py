"""The web page's checks: limits, masks, uploads, adapters by name, what the command line hands to it."""

import pytest
from browsing import need_gradio
from PIL import Image
from test_lora import noisy_adapter

from unified.cli import main
from unified.serving import web as demo
from unified.serving.engine import Engine
from unified.serving.web import build_demo, checked, load_adapters, opened, painted


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("x" * 301, "", 0, 1), "prompt: 301 characters, at most 300"),
        (("x", "y" * 400, 0, 1), "negative prompt: 400 characters"),
        (("x", "", -1, 1), "seed: -1"),
        (("x", "", None, 1), "seed: None"),
        (("x", "", 0, 5), "pictures: 5 must be a whole number from 1 to 4"),
    ],
)
def test_limits(arguments, message):
    with pytest.raises(ValueError, match=message):
        checked(*arguments)


def test_painted_layers_become_a_mask():
    layer = Image.new("RGBA", (32, 32))
    layer.paste((255, 0, 0, 90), (0, 16, 32, 32))
    image, mask = painted({"background": Image.new("RGB", (32, 32), "red"), "layers": [layer]}, (16, 16))
    assert image.size == mask.size == (16, 16) and mask.getbbox() == (0, 8, 16, 16)
    with pytest.raises(ValueError, match="mask: nothing is painted"):
        painted({"background": image, "layers": []}, (16, 16))
    with pytest.raises(ValueError, match="image: none given"):
        painted(None, (16, 16))


def test_wide_images_are_cropped_not_squeezed():
    """The middle of an image three times as wide as high, and the mask at the same place."""
    image = Image.new("RGB", (96, 32), "red")
    image.paste("blue", (32, 0, 64, 32))
    layer = Image.new("RGBA", (96, 32))
    layer.paste((0, 0, 0, 255), (48, 0, 96, 32))
    picture, mask = painted({"background": image, "layers": [layer]}, (32, 32))
    assert set(picture.get_flattened_data()) == {(0, 0, 255)} and mask.getbbox() == (16, 0, 32, 32)


def test_transparent_uploads_are_laid_on_white(tmp_path):
    image = Image.new("RGBA", (32, 32), (0, 0, 0, 0))
    image.save(tmp_path / "nothing.png")
    assert set(opened(tmp_path / "nothing.png").get_flattened_data()) == {(255, 255, 255)}
    picture, _ = painted({"background": image, "layers": [Image.new("RGBA", (32, 32), "red")]}, (16, 16))
    assert set(picture.get_flattened_data()) == {(255, 255, 255)}


def test_huge_images_are_refused_before_they_are_decoded(tmp_path, monkeypatch):
    Image.new("1", (5000, 4000)).save(tmp_path / "huge.png")
    assert (tmp_path / "huge.png").stat().st_size < 10_000
    monkeypatch.setattr(Image.Image, "convert", lambda *given: pytest.fail("decoded"))
    with pytest.raises(ValueError, match="image: 5000x4000 pixels, at most 16 million are allowed here"):
        opened(tmp_path / "huge.png")
    with Image.open(tmp_path / "huge.png") as image, pytest.raises(ValueError, match="at most 16 million"):
        painted({"background": image, "layers": [image]}, (16, 16))
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(ValueError, match="image: cannot be read"):
        opened(tmp_path / "text.png")


def test_bad_adapters_are_refused(pipeline, tmp_path):
    for folders in (["x/a", "y/a"], ["none"], ["v1.2"]):
        with pytest.raises(ValueError, match="must be different names without dots"):
            load_adapters(pipeline, [tmp_path / folder for folder in folders])
    with pytest.raises(ValueError, match=r"holds no unified_base.json"):
        load_adapters(pipeline, [tmp_path / "a"])


def test_command_line_offers_adapters_by_name(pipeline, tmp_path, monkeypatch):
    """--lora is listed under its folder's name and chosen, --loras are listed; max_rows and queue reach the engine."""
    need_gradio()
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)
    pipeline.save_pretrained(tmp_path / "pipeline")
    for name, seed in (("outline", 1), ("sketch", 2)):
        pipeline.model = noisy_adapter(pipeline.model, tmp_path / name, seed)
    pages, engines, make = [], [], build_demo
    monkeypatch.setattr(demo, "build_demo", lambda engine, *given: engines.append(engine) or make(engine, *given))
    monkeypatch.setattr(demo, "launch", lambda page, **options: pages.append((page, options)))
    arguments = ["serve", "--pipeline", str(tmp_path / "pipeline"), "--lora", f"{tmp_path}/outline/", "--max-rows", "3"]
    assert main([*arguments, "--loras", str(tmp_path / "sketch"), "--queue", "5", "--port", "1234"]) == 0
    ((page, options),) = pages
    (lora,) = (block for block in page.blocks.values() if block.elem_id == "lora")
    assert [name for name, _ in lora.choices] == ["none", "outline", "sketch"] and lora.value == "outline"
    assert (engines[0].max_rows, engines[0].limit, options["server_port"]) == (3, 5, 1234)
    assert not engines[0]._thread.is_alive()


def test_the_decoder_is_kept_until_the_adapter_changes(pipeline, tmp_path):
    """Requests for the adapter that is active already do not prepare its weights again."""
    pipeline.model = noisy_adapter(pipeline.model, tmp_path / "a", 1)
    load_adapters(pipeline, [tmp_path / "a"])
    engine = Engine(pipeline)
    try:

        def decoder(adapter):
            return engine.alone(lambda: [pipeline._decoder()], adapter).result(30)

        first, again, base = decoder("a"), decoder("a"), decoder(None)
        assert first is again and base is not first and engine._batcher.decoder is base
    finally:
        engine.close()

"""The web page's checks: limits, masks, uploads, adapters by name, what the command line hands to it."""

from contextlib import closing
from types import SimpleNamespace

import pytest
from browsing import need_gradio
from conftest import noisy_adapter
from PIL import Image

from unified.cli import main
from unified.data.crops import fit
from unified.serving import web as demo
from unified.serving.engine import Engine
from unified.serving.web import (
    build_demo,
    check_parts,
    check_request,
    fit_upload,
    image_and_mask,
    launch,
    load_adapters,
    opened,
)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("x" * 301, "", 0, 1), "prompt: 301 characters, at most 300"),
        (("x", "y" * 400, 0, 1), "negative prompt: 400 characters"),
        (("x", "", -1, 1), "seed: -1"),
        (("x", "", None, 1), "seed: None"),
        (("x", "", float("nan"), 1), "seed: nan"),
        (("x", "", float("inf"), 1), "seed: inf"),
        (("x", "", 0.5, 1), "seed: 0.5"),
        (("x", "", 0, 5), "images: 5 must be a whole number from 1 to 4"),
    ],
)
def test_limits(arguments, message):
    with pytest.raises(ValueError, match=message):
        check_request(*arguments)


def test_painted_layers_become_a_mask():
    layer = Image.new("RGBA", (32, 32))
    layer.paste((255, 0, 0, 90), (0, 16, 32, 32))
    image, mask = image_and_mask({"background": Image.new("RGB", (32, 32), "red"), "layers": [layer]}, (16, 16))
    assert image.size == mask.size == (16, 16) and mask.getbbox() == (0, 8, 16, 16)
    with pytest.raises(ValueError, match="mask: nothing is painted"):
        image_and_mask({"background": image, "layers": []}, (16, 16))
    with pytest.raises(ValueError, match="image: none given"):
        image_and_mask(None, (16, 16))


def test_wide_images_are_cropped_not_squeezed():
    """The middle of an image three times as wide as high, and the mask at the same place."""
    image = Image.new("RGB", (96, 32), "red")
    image.paste("blue", (32, 0, 64, 32))
    layer = Image.new("RGBA", (96, 32))
    layer.paste((0, 0, 0, 255), (48, 0, 96, 32))
    image, mask = image_and_mask({"background": image, "layers": [layer]}, (32, 32))
    assert set(image.get_flattened_data()) == {(0, 0, 255)} and mask.getbbox() == (16, 0, 32, 32)


def test_transparent_uploads_are_laid_on_white(tmp_path):
    image = Image.new("RGBA", (32, 32), (0, 0, 0, 0))
    image.save(tmp_path / "nothing.png")
    assert set(opened(tmp_path / "nothing.png").get_flattened_data()) == {(255, 255, 255)}
    image, _ = image_and_mask({"background": image, "layers": [Image.new("RGBA", (32, 32), "red")]}, (16, 16))
    assert set(image.get_flattened_data()) == {(255, 255, 255)}


def test_huge_images_are_refused_before_they_are_decoded(tmp_path, monkeypatch):
    Image.new("1", (5000, 4000)).save(tmp_path / "huge.png")
    assert (tmp_path / "huge.png").stat().st_size < 10_000
    monkeypatch.setattr(Image.Image, "convert", lambda *given: pytest.fail("decoded"))
    with pytest.raises(ValueError, match="5000x4000 pixels, at most 16 million are allowed"):
        opened(tmp_path / "huge.png")
    Image.new("1", (1, 200_000)).save(tmp_path / "line.png")
    with pytest.raises(ValueError, match="image: 1x200000 pixels, at most 16384 are allowed on a side here"):
        opened(tmp_path / "line.png")
    with Image.open(tmp_path / "line.png") as image, pytest.raises(ValueError, match="on a side"):
        image_and_mask({"background": image, "layers": [image]}, (16, 16))
    with Image.open(tmp_path / "huge.png") as image, pytest.raises(ValueError, match="at most 16 million"):
        image_and_mask({"background": image, "layers": [image]}, (16, 16))
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(ValueError, match="image: cannot be read"):
        opened(tmp_path / "text.png")


@pytest.mark.parametrize("size", [(16_384, 1), (1, 16_384)])
def test_lines_are_cropped_before_they_are_enlarged(monkeypatch, size):
    """One pixel wide and as long as allowed: not 64 times its whole length."""
    line = Image.new("RGB", size, "red")
    line.putpixel((size[0] // 2, size[1] // 2), (0, 0, 255))
    sizes, resize = [], Image.Image.resize

    def watched(image, size, *given, **box):
        sizes.append(size)
        return resize(image, size, *given, **box)

    monkeypatch.setattr(Image.Image, "resize", watched)
    enlarged = fit_upload(line, (64, 64))
    assert enlarged.size == (64, 64) and enlarged.getpixel((40, 40))[2] > 100 and sizes == [(64, 64)]


@pytest.mark.parametrize("size", [(20, 30), (30, 20), (7, 9), (48, 24)])
def test_enlarging_shows_what_training_would_show(size):
    """As for images that are cropped after they are scaled, but for rounding and the border."""
    image = Image.effect_mandelbrot(size, (-2, -1, 1, 1), 50).convert("L")
    whole, cropped, other = fit(image, (32, 32)), fit_upload(image, (32, 32)), fit(image.rotate(180), (32, 32))

    def difference(a, b):
        return sum(abs(x - y) for x, y in zip(a.tobytes(), b.tobytes(), strict=True)) / 32**2

    assert difference(whole, cropped) < 4 < 20 < difference(whole, other)


def test_parts_of_an_edited_image_are_limited(tmp_path):
    Image.new("1", (5000, 4000)).save(tmp_path / "huge.png")
    Image.new("1", (50, 40)).save(tmp_path / "small.png")
    small, huge = (SimpleNamespace(path=str(tmp_path / f"{name}.png")) for name in ("small", "huge"))
    check_parts([small] * 6)
    check_parts([None, (tmp_path / "small.png").read_bytes(), None])
    with pytest.raises(ValueError, match="image: 5 layers, at most 4 are allowed here; merge them"):
        check_parts([small] * 7)
    for part in (huge, (tmp_path / "huge.png").read_bytes()):
        with pytest.raises(ValueError, match="image: 5000x4000 pixels"):
            check_parts([small, part, small])
    with pytest.raises(ValueError, match="image: cannot be read"):
        check_parts([b"no image"])


def test_bad_adapters_are_refused(pipeline, tmp_path):
    for folders in (["x/a", "y/a"], ["none"], ["v1.2"]):
        with pytest.raises(ValueError, match="must be different names without dots"):
            load_adapters(pipeline, [tmp_path / folder for folder in folders])
    with pytest.raises(ValueError, match=r"holds no unified_base.json"):
        load_adapters(pipeline, [tmp_path / "a"])


@pytest.mark.process
def test_command_line_offers_adapters_by_name(pipeline, tmp_path, monkeypatch):
    """--lora is listed under its folder's name and chosen, --loras are listed; max_rows and queue reach the engine."""
    need_gradio()
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)
    pipeline.save_pretrained(tmp_path / "pipeline")
    for name, seed in (("outline", 1), ("sketch", 2)):
        pipeline.model = noisy_adapter(pipeline.model, tmp_path / name, seed)
    pages, engines, make = [], [], build_demo
    monkeypatch.setattr(demo, "build_demo", lambda engine, *given: engines.append(engine) or make(engine, *given))
    monkeypatch.setattr(demo, "launch", lambda page, *given, **options: pages.append((page, *given, options)))
    monkeypatch.setenv("UNIFIED_PASSWORD", "open sesame")
    arguments = ["serve", "--pipeline", str(tmp_path / "pipeline"), "--lora", f"{tmp_path}/outline/", "--max-rows", "3"]
    assert main([*arguments, "--loras", str(tmp_path / "sketch"), "--queue", "5", "--port", "1234"]) == 0
    ((page, threads, password, options),) = pages
    (lora,) = (block for block in page.blocks.values() if block.elem_id == "lora")
    assert [name for name, _ in lora.choices] == ["none", "outline", "sketch"] and lora.value == "outline"
    assert (engines[0].max_rows, engines[0].limit, options["server_port"]) == (3, 5, 1234)
    assert threads > 3 + 5 and password == "open sesame" and not engines[0]._thread.is_alive()


def test_a_password_is_asked_for(pipeline, monkeypatch):
    need_gradio()
    import httpx
    from gradio import networking

    monkeypatch.setattr(networking, "url_ok", lambda url: True)  # gradio gives its own server 3 s
    with closing(Engine(pipeline)) as engine:
        page = build_demo(engine)
        _, address, _ = launch(
            page, password="open sesame", prevent_thread_lock=True, quiet=True, server_name="127.0.0.1"
        )
        try:
            for given, status in (("open sesame", 200), ("open sesam", 400)):
                with httpx.Client(base_url=address, timeout=60) as client:
                    assert client.get("gradio_api/info").status_code == 401
                    assert client.post("login", data={"username": "x", "password": given}).status_code == status
                    assert client.get("gradio_api/info").status_code == (200 if status == 200 else 401)
        finally:
            page.close()


def test_an_edited_image_is_checked_before_gradio_decodes_it(pipeline, tmp_path, monkeypatch):
    need_gradio()
    import gradio
    from gradio.components.image_editor import EditorData, EditorDataBlobs
    from gradio.data_classes import FileData

    with closing(Engine(pipeline)) as engine:
        page = build_demo(engine)
    (canvas,) = (block for block in page.blocks.values() if block.elem_id == "canvas")
    Image.new("RGBA", (50, 40), "red").save(tmp_path / "small.png")
    Image.new("1", (5000, 4000)).save(tmp_path / "huge.png")
    small, huge = (FileData(path=str(tmp_path / f"{name}.png")) for name in ("small", "huge"))
    value = canvas.preprocess(EditorData(background=small, layers=[small], composite=small))
    assert value["background"].size == (50, 40) and len(value["layers"]) == 1 and canvas.preprocess(None) is None
    data = (tmp_path / "small.png").read_bytes()
    canvas.blob_storage["x"] = EditorDataBlobs(background=data, layers=[data] * 5, composite=data)
    monkeypatch.setattr(Image.Image, "convert", lambda *given: pytest.fail("decoded"))
    for payload, message in (
        (EditorData(background=huge), "5000x4000 pixels"),
        (EditorData(background=small, layers=[small, huge]), "5000x4000 pixels"),
        (EditorData(background=small, layers=[small] * 5), "5 layers, at most 4"),
        (EditorData(id="x"), "5 layers, at most 4"),
    ):
        with pytest.raises(gradio.Error, match=message):
            canvas.preprocess(payload)


def test_the_decoder_is_kept_until_the_adapter_changes(pipeline, tmp_path):
    """Requests for the adapter that is active already do not prepare its weights again."""
    pipeline.model = noisy_adapter(pipeline.model, tmp_path / "a", 1)
    load_adapters(pipeline, [tmp_path / "a"])
    engine = Engine(pipeline)
    try:

        def decoder(adapter):
            return engine.alone(lambda: [pipeline.decoder()], adapter).result(30)

        first, again, base = decoder("a"), decoder("a"), decoder(None)
        assert first is again and base is not first and engine._batcher.decoder is base
    finally:
        engine.close()

"""The web page's checks: limits, masks, uploads, adapters by name, what the command line hands to it."""

from contextlib import closing, nullcontext
from types import SimpleNamespace

import pytest
from browsing import need_gradio
from conftest import noisy_adapter
from PIL import Image, ImageFile

from unified.cli import main
from unified.conversation import DEFAULT_TEMPLATE
from unified.data.crops import fit
from unified.decoding import Sampling
from unified.pipeline.arguments import seeded
from unified.pipeline.chat import message
from unified.serving import uploads, web
from unified.serving.desk import check_request
from unified.serving.engine import Engine
from unified.serving.page import build_demo
from unified.serving.uploads import check_files, fit_upload, image_and_mask, opened, painted
from unified.serving.web import launch, load_adapters


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


@pytest.fixture
def saved(tmp_path):
    """Saves an image under a name; gives the path."""

    def save(name, image):
        image.save(tmp_path / f"{name}.png")
        return tmp_path / f"{name}.png"

    return save


def test_painted_layers_become_a_mask(saved):
    layer = Image.new("RGBA", (32, 32))
    layer.paste((255, 0, 0, 90), (0, 16, 32, 32))
    red, layer = saved("red", Image.new("RGB", (32, 32), "red")), saved("layer", layer)
    image, mask = image_and_mask(red, [layer], (16, 16))
    assert image.size == mask.size == (16, 16) and mask.getbbox() == (0, 8, 16, 16)
    assert set(image.get_flattened_data()) == {(255, 0, 0)}
    with pytest.raises(ValueError, match="mask: nothing is painted"):
        image_and_mask(red, [], (16, 16))


def test_wide_images_are_cropped_not_squeezed(saved):
    """The middle of an image three times as wide as high, and the mask at the same place."""
    image = Image.new("RGB", (96, 32), "red")
    image.paste("blue", (32, 0, 64, 32))
    layer = Image.new("RGBA", (96, 32))
    layer.paste((0, 0, 0, 255), (48, 0, 96, 32))
    image, mask = image_and_mask(saved("image", image), [saved("layer", layer)], (32, 32))
    assert set(image.get_flattened_data()) == {(0, 0, 255)} and mask.getbbox() == (16, 0, 32, 32)


def test_transparent_uploads_are_laid_on_white(saved):
    nothing, red = saved("nothing", Image.new("RGBA", (32, 32))), saved("red", Image.new("RGBA", (32, 32), "red"))
    assert set(opened(nothing).get_flattened_data()) == {(255, 255, 255)}
    image, _ = image_and_mask(nothing, [red], (16, 16))
    assert set(image.get_flattened_data()) == {(255, 255, 255)}


def test_huge_images_are_refused_before_they_are_decoded(saved, tmp_path, monkeypatch):
    huge, line = saved("huge", Image.new("1", (5000, 4000))), saved("line", Image.new("1", (1, 200_000)))
    small = saved("small", Image.new("RGBA", (50, 40)))
    assert huge.stat().st_size < 10_000 and line.stat().st_size < 500
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda *given: pytest.fail("decoded"))
    check_files(small, [small] * 4)
    for background, layers, error in (
        (huge, [], "5000x4000 pixels, at most 16 million are allowed"),
        (small, [small, huge], "5000x4000 pixels, at most 16 million are allowed"),
        (line, [], "image: 1x200000 pixels, at most 16384 are allowed on a side here"),
        (small, [line], "image: 1x200000 pixels, at most 16384 are allowed on a side here"),
        (small, [small] * 5, "image: 5 layers, at most 4 are allowed here; merge them"),
        (None, [], "image: none given"),
    ):
        with pytest.raises(ValueError, match=error):
            check_files(background, layers)
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "program.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n")
    for name in ("text", "program", "nothing"):
        with pytest.raises(ValueError, match=r"^image: cannot be read; upload a PNG, JPEG or WebP file\.$"):
            check_files(tmp_path / f"{name}.png", [])


def test_an_image_that_is_given_again_is_not_decoded_again(saved, monkeypatch):
    layer, read = saved("layer", Image.new("RGBA", (16, 16), "red")), []
    monkeypatch.setattr(uploads, "painted", lambda file: read.append(file) or painted(file))
    image_and_mask(layer, [layer] * 4, (16, 16))
    assert read == [layer]


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


def test_bad_adapters_are_refused(pipeline, tmp_path):
    for folders in (["x/a", "y/a"], ["none"], ["v1.2"]):
        with pytest.raises(ValueError, match="must be different names without dots"):
            load_adapters(pipeline, [tmp_path / folder for folder in folders])
    with pytest.raises(ValueError, match=r"holds no adapter_config.json"):
        load_adapters(pipeline, [tmp_path / "a"])


@pytest.mark.process
def test_command_line_offers_adapters_by_name(pipeline, tmp_path, monkeypatch):
    """--lora is listed under its folder's name and chosen, --loras are listed; max_rows and queue reach the engine."""
    need_gradio()
    pipeline.save_pretrained(tmp_path / "pipeline")
    for name, seed in (("outline", 1), ("sketch", 2)):
        pipeline.model = noisy_adapter(pipeline.model, tmp_path / name, seed)
    pages, engines, make = [], [], build_demo
    monkeypatch.setattr(web, "build_demo", lambda engine, *given: engines.append(engine) or make(engine, *given))
    monkeypatch.setattr(web, "launch", lambda page, **options: pages.append((page, options)))
    monkeypatch.setenv("UNIFIED_PASSWORD", "open sesame")
    arguments = ["serve", "--pipeline", str(tmp_path / "pipeline"), "--lora", f"{tmp_path}/outline/", "--max-rows", "3"]
    more = ["--queue", "5", "--port", "0", "--per-client", "2", "--allow-host", "demo", "--allow-host", "*.example.org"]
    assert main([*arguments, "--loras", str(tmp_path / "sketch"), *more]) == 0
    ((page, options),) = pages
    (lora,) = (block for block in page.blocks.values() if block.elem_id == "lora")
    assert [name for name, _ in lora.choices] == ["none", "outline", "sketch"] and lora.value == "outline"
    assert (engines[0].max_rows, engines[0].limit, page.visitors.limit) == (3, 5, 2) and options["server_port"] > 0
    assert options["threads"] > 3 + 5 and options["password"] == "open sesame" and not engines[0]._thread.is_alive()
    assert (options["host"], options["allow_hosts"]) == ("127.0.0.1", ["demo", "*.example.org"])


@pytest.mark.process
def test_a_password_is_asked_for(pipeline, monkeypatch):
    need_gradio()
    import httpx
    from gradio import networking

    monkeypatch.setattr(networking, "url_ok", lambda url: True)  # gradio gives its own server 3 s
    with closing(Engine(pipeline)) as engine:
        page = build_demo(engine)
        _, address, _ = launch(page, password="open sesame", prevent_thread_lock=True, quiet=True)
        try:
            for given, status in (("open sesame", 200), ("open sesam", 400)):
                with httpx.Client(base_url=address, timeout=60) as client:
                    assert client.get("gradio_api/info").status_code == 401
                    assert client.post("login", data={"username": "x", "password": given}).status_code == status
                    assert client.get("gradio_api/info").status_code == (200 if status == 200 else 401)
        finally:
            page.close()


@pytest.mark.process
def test_gradio_decodes_nothing(pipeline, saved, monkeypatch):
    """The page gets the names of uploaded files, whatever a request says about them."""
    need_gradio()
    from gradio.components.image_editor import EditorData, EditorDataBlobs
    from gradio.data_classes import FileData, ImageData

    with closing(Engine(pipeline)) as engine:
        page = build_demo(engine)
    parts = {block.elem_id: block for block in page.blocks.values()}
    path = str(saved("small", Image.new("RGBA", (50, 40), "red")))
    monkeypatch.setattr(Image, "open", lambda *given: pytest.fail("opened"))
    file = FileData(path=path)
    canvas, upload = parts["canvas"], parts["upload"]
    assert canvas.preprocess(EditorData(background=file, layers=[file, file], composite=file)) == (path, [path, path])
    canvas.blob_storage["x"] = EditorDataBlobs(background=b"x", layers=[b"x"], composite=b"x")
    assert canvas.preprocess(EditorData(id="x")) == canvas.preprocess(None) == (None, [])
    assert upload.preprocess(ImageData(path=path, url="data:image/png;base64,aaaa", orig_name="x.svg")) == path
    assert upload.preprocess(None) is None


def test_a_conversation_on_the_page(pipeline, saved, tmp_path, monkeypatch):
    """The reply grows, turns are kept with their images, and mistakes are words."""
    need_gradio()
    from gradio.exceptions import Error

    monkeypatch.setattr("unified.serving.guard.Visitors.turn", lambda self, *given: nullcontext())
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "cache"))
    pipeline.model.config.chat_template = DEFAULT_TEMPLATE
    red, who = str(saved("red", Image.new("RGB", (40, 32), "red"))), SimpleNamespace(host="here")
    request = SimpleNamespace(client=who, session_hash="x")
    with closing(Engine(pipeline)) as engine:
        page = build_demo(engine)
        (converse,) = (each.fn for each in page.fns.values() if each.name == "converse")
        states = [
            state for state in converse("red apple", red, [], 3, 0.5, "none", request) if isinstance(state[0], list)
        ]
        kept, shown, text, file, status = states[-1]
        first = pipeline.chat(kept[:1], text_sampling=Sampling(temperature=0.5), generator=seeded(3, 1))
        before = [message("user", "red"), message("assistant", "car")]
        again = [*converse("blue car", None, before, 3, 0.5, "none", request)][-1][0]
        for given, error in (
            ((" ", None), "message: empty"), (("x" * 301, None), "301 characters"), (("a", "no.png"), "cannot be read"),
        ):  # fmt: skip
            with pytest.raises(Error, match=error):
                list(converse(*given, [], 0, 1.0, "none", request))
    assert (text, file, status) == ("", None, "Done.")
    content = kept[0]["content"]
    assert content[0]["image"].size == (16, 16) and content[1] == {"type": "text", "text": "red apple"}
    reply = [part["text"] if part["type"] == "text" else part["image"].tobytes() for part in kept[1]["content"]]
    assert reply == [part if isinstance(part, str) else part.tobytes() for part in first]
    assert [each["role"] for each in shown] == ["user"] * 2 + ["assistant"] * len(first)
    assert Image.open(shown[0]["content"]["path"]).size == (16, 16) and shown[1]["content"] == "red apple"
    assert again[:2] == before and again[2] == message("user", "blue car")
    (tab,) = (block for block in page.blocks.values() if getattr(block, "label", None) == "Chat")
    assert tab.visible


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

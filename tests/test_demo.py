"""The web page: its checks, and the page itself in a headless browser where gradio, playwright and chromium are there."""

import base64
import io
import shutil
import time

import pytest
from conftest import generators
from PIL import Image
from test_lora import noisy_adapter

from unified.demo import build_demo, checked, choose_adapter, painted


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


def test_adapters_switch(pipeline, tmp_path):
    draw = lambda: pipeline("red apple", generator=generators(0)).codes.tolist()  # noqa: E731
    base = draw()
    for name, seed in (("a", 1), ("b", 2)):
        pipeline.model = noisy_adapter(pipeline.model, tmp_path / name, seed, train_image_tables=name == "b")
    for name in "ab":
        pipeline.load_lora_weights(tmp_path / name, name)
    results = []
    for name in ("a", "b", "none", "a"):
        choose_adapter(pipeline, ["a", "b"], name)
        results.append(draw())
    assert results[2] == base and results[0] == results[3] and len({str(r) for r in results}) == 3
    with pytest.raises(ValueError, match="lora: 'c' is not offered"):
        choose_adapter(pipeline, ["a", "b"], "c")


def test_bad_pages_are_refused(pipeline, tmp_path):
    pytest.importorskip("gradio", reason="the page needs gradio: pip install '.[demo]'")
    with pytest.raises(ValueError, match="queue: 0 must be at least 1"):
        build_demo(pipeline, waiting=0)
    with pytest.raises(ValueError, match="must be different names"):
        build_demo(pipeline, [tmp_path / "x" / "a", tmp_path / "y" / "a"])
    with pytest.raises(ValueError, match=r"holds no unified_layout.json"):
        build_demo(pipeline, [tmp_path / "a"])


@pytest.fixture
def browser():
    pytest.importorskip("gradio", reason="the page needs gradio: pip install '.[demo]'")
    playwright = pytest.importorskip("playwright.sync_api", reason="the browser test needs playwright")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("the browser test needs chromium on the path")
    with playwright.sync_playwright() as running:
        opened = running.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield opened
        opened.close()


def test_page_in_a_browser(pipeline, tmp_path, browser, monkeypatch):
    """Prompt and seed in, previews and the picture out; another adapter; a mistake is a message."""
    pipeline.model = noisy_adapter(pipeline.model, tmp_path / "outline", 1)
    options = {"guidance_scale": 1.5, "temperature": 0.85}
    expected = pipeline("red apple", generator=generators(7), **options).images[0]
    page = build_demo(pipeline, [tmp_path / "outline"], waiting=2)
    assert page._queue.max_size == 2
    finish = pipeline._output
    # As slow as a larger model, so that previews can be seen.
    monkeypatch.setattr(pipeline, "_output", lambda *given: (time.sleep(0.5), finish(*given))[1])
    _, address, _ = page.launch(prevent_thread_lock=True, quiet=True, server_name="127.0.0.1")
    try:
        tab = browser.new_page()
        tab.goto(address)
        shown: list[bytes] = []

        def picture() -> Image.Image:
            """The picture on the page, as its own bytes."""
            source = tab.locator("#pictures img").first.get_attribute("src")
            body = (
                tab.request.get(source).body() if source.startswith("http") else base64.b64decode(source.split(",")[1])
            )
            shown.append(body)
            return Image.open(io.BytesIO(body)).convert("RGB")

        def draw(wanted: Image.Image) -> None:
            tab.locator("#draw").click()
            for _ in range(150):
                tab.wait_for_timeout(100)
                if tab.locator("#pictures img").count() and picture().tobytes() == wanted.tobytes():
                    return
            raise AssertionError("the picture did not appear")

        tab.get_by_label("Prompt", exact=True).fill("red apple")
        tab.get_by_label("Seed").fill("7")
        draw(expected)
        assert len(set(shown)) > 1  # previews came before it
        tab.get_by_label("LoRA").click()
        tab.get_by_role("option", name="outline").click()
        pipeline.enable_lora()
        adapted = pipeline("red apple", generator=generators(7), **options).images[0]
        assert adapted.tobytes() != expected.tobytes()
        draw(adapted)
        tab.get_by_label("Prompt", exact=True).fill("   ")
        tab.locator("#draw").click()
        tab.get_by_text("is not a caption").first.wait_for(timeout=10000)
    finally:
        page.close()

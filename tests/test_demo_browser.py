"""The web page as people use it: in a headless browser, against what the pipeline gives without a page."""

import io
import socket
import threading
import time

import pytest
from browsing import chromium, need_gradio
from conftest import generators, noisy_adapter, tiny_pipeline
from PIL import Image

from unified.conversation import DEFAULT_TEMPLATE
from unified.data.crops import fit
from unified.decoding import Sampling
from unified.pipeline.chat import message
from unified.serving.engine import Engine
from unified.serving.page import build_demo
from unified.serving.web import launch, load_adapters

pytestmark = pytest.mark.process

OPTIONS = {"guidance_scale": 1.5, "temperature": 0.85}
WAIT = 60_000  # ms, for a busy machine


class Page:
    """The open page, and what it should show."""

    def __init__(self, tab, engine, expected, folder):
        self.tab, self.engine, self.expected, self.folder = tab, engine, expected, folder
        self._seen = {}
        tab.set_default_timeout(WAIT)

    def image(self, place, index=0):
        """An image in an element as RGB bytes, None without one."""
        image = self.tab.locator(f"{place} img").nth(index)
        source = image.get_attribute("src") if image.count() else None
        if source is None:
            return None
        if source not in self._seen:
            body = self.tab.request.get(source).body()
            self._seen[source] = Image.open(io.BytesIO(body)).convert("RGB").tobytes()
        return self._seen[source]

    def wait_for(self, place, wanted, index=0, seconds=60):
        """Wait for an image; returns the different ones that were there on the way."""
        seen = []
        for _ in range(seconds * 20):
            if (now := self.image(place, index)) is not None and now not in seen:
                seen.append(now)
            if now == wanted:
                return seen
            self.tab.wait_for_timeout(50)
        raise AssertionError("the image did not appear")

    def until(self, condition):
        """Let the page go on until something holds, for a minute at most."""
        for _ in range(600):
            if condition():
                break
            self.tab.wait_for_timeout(100)

    def set(self, **fields):
        for name, value in fields.items():
            self.tab.locator(f"#{name} input[type=number], #{name} textarea").first.fill(str(value))
            self.tab.keyboard.press("Tab")

    def choose(self, what, name):
        self.tab.locator(f"#{what} input").click()
        self.tab.get_by_role("option", name=name).click()

    def open(self, name):
        self.tab.get_by_role("tab", name=name).click()

    def message(self, text):
        """Wait for a message and close it."""
        toast = self.tab.locator(".toast-body", has_text=text)
        toast.first.wait_for()
        toast.first.get_by_test_id("toast-close").click()
        toast.first.wait_for(state="detached")


@pytest.fixture(scope="module")
def page(text_tokenizer, image_tokenizer, tmp_path_factory):
    need_gradio()
    from gradio import networking

    networking.url_ok = lambda url: True  # gradio gives its own server 3 s, the browser is more patient
    folder = tmp_path_factory.mktemp("page")
    pipe = tiny_pipeline(text_tokenizer, image_tokenizer)
    pipe.model.config.chat_template = DEFAULT_TEMPLATE

    def sample(seed, **options):
        return pipe("red apple", generator=generators(seed), **OPTIONS | options).images[0].tobytes()

    expected = {"7": sample(7), "8": sample(8), "guided": sample(7, guidance_scale=6.0)}
    image = Image.effect_mandelbrot((480, 320), (-2, -1, 1, 1), 50).convert("RGB")
    image.save(folder / "image.png")
    wide = {"negative_prompt": "blue car", "num_images_per_prompt": 2, "guidance_scale": 1.5, "temperature": 1.2}
    for mode in ("plain", "jacobi", "sjd", "gsd"):
        images = pipe("red apple", decoding=mode, generator=generators(7, 8), **wide).images
        expected[f"{mode} 7"], expected[f"{mode} 8"] = (image.tobytes() for image in images)
    expected["caption"] = pipe.caption(fit(image, (16, 16)), temperature=0.85, generator=generators(7)[0])[0]
    pipe.model = noisy_adapter(pipe.model, folder / "outline", 1)
    load_adapters(pipe, [folder / "outline"])
    expected["outline"] = sample(7)
    assert len({expected[name] for name in ("7", "8", "guided", "outline", "plain 7", "sjd 7", "gsd 7")}) == 7
    assert expected["jacobi 7"] == expected["plain 7"]

    connected, connect = set(), socket.socket.connect
    socket.socket.connect = lambda self, address: connected.add(address) or connect(self, address)
    engine = Engine(pipe, max_rows=2, waiting=2)
    blocks = build_demo(engine)
    _, address, _ = launch(blocks, prevent_thread_lock=True, quiet=True)
    try:
        with chromium(folder / "profile") as browser:
            requested = []
            browser.on("request", lambda request: requested.append(request.url))
            tab = browser.new_page()
            tab.goto(address)
            yield Page(tab, engine, expected, folder)
            outside = [url for url in requested if not url.startswith((address, "data:", "blob:"))]
            assert requested and not outside  # no fonts, no scripts, no statistics from elsewhere
            assert {host for host, *_ in (a for a in connected if isinstance(a, tuple))} <= {"127.0.0.1", "::1"}
    finally:
        socket.socket.connect = connect
        blocks.close()
        engine.close()


def test_a_prompt_becomes_previews_and_the_image(page, monkeypatch):
    step = page.engine._batcher.step
    monkeypatch.setattr(page.engine._batcher, "step", lambda: (time.sleep(0.1), step())[1])  # as slow as a larger model
    page.set(prompt="red apple", seed=7)
    page.tab.locator("#generate").click()
    previews = page.wait_for("#images", page.expected["7"])
    assert len(previews) > 1 and page.expected["7"] == previews[-1]
    page.tab.locator("#status", has_text="Done: guidance 1.5, temperature 0.85, LoRA none.").wait_for()
    page.tab.locator("#images", has_text="seed 7").wait_for()


def test_seed_guidance_and_adapter_decide(page):
    for change, wanted in ((8, "8"), (7, "7")):
        page.set(prompt="red apple", seed=change)
        page.tab.locator("#generate").click()
        page.wait_for("#images", page.expected[wanted])
    page.set(guidance=6)
    page.tab.locator("#generate").click()
    page.wait_for("#images", page.expected["guided"])
    page.set(guidance=1.5)
    page.choose("lora", "outline")
    page.tab.locator("#generate").click()
    page.wait_for("#images", page.expected["outline"])
    page.choose("lora", "none")


def test_stop_frees_the_batch(page, monkeypatch):
    gate, step = threading.Semaphore(6), page.engine._batcher.step
    monkeypatch.setattr(page.engine._batcher, "step", lambda: (gate.acquire(), step())[1])
    page.set(prompt="red apple", seed=8)
    page.tab.locator("#generate").click()
    page.tab.locator("#status", has_text="25%").wait_for()
    page.tab.locator("#stop").click()
    deadline = time.monotonic() + 60
    while page.engine._running and time.monotonic() < deadline:
        gate.release()
        page.tab.wait_for_timeout(500)
    assert not page.engine._running and page.image("#images") != page.expected["8"]
    gate.release(1000)


def test_more_options_decide(page):
    """Two images steered away from something, in every way of decoding."""
    page.tab.get_by_text("More options").click()
    page.set(prompt="red apple", seed=7, temperature=1.2, negative="blue car", count=2)
    for mode, text in (
        ("sjd", "same distribution"),
        ("jacobi", "same image"),
        ("gsd", "fastest"),
        ("plain", "pass by pass"),
    ):
        page.choose("decoding", text)
        page.tab.locator("#generate").click()
        for index in (0, 1):
            page.wait_for("#images", page.expected[f"{mode} {7 + index}"], index)
    page.tab.locator("#status", has_text="Done: guidance 1.5, temperature 1.2, LoRA none.").wait_for()
    page.set(temperature=0.85, negative="", count=1)


def test_edit_changes_what_is_painted(page, monkeypatch):
    """A stripe is painted with the mouse; it becomes what inpainting samples there."""
    given, stream = [], page.engine.pipe.stream
    monkeypatch.setattr(page.engine.pipe, "stream", lambda prompt, **rest: given.append(rest) or stream(prompt, **rest))
    page.open("Edit")
    page.tab.locator("#canvas").get_by_label("Brush").first.wait_for()  # the editor is ready for an image
    page.tab.locator("#canvas input[type=file]").set_input_files(page.folder / "image.png")
    page.tab.locator("#canvas").get_by_label("Brush Size").wait_for()  # the brush is taken up
    box = page.tab.locator("#canvas canvas").first.bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2 + 30
    page.tab.mouse.move(x - 30, y)
    page.tab.mouse.down()
    page.tab.mouse.move(x + 30, y, steps=4)
    page.tab.mouse.up()
    page.set(whole="blue car", seed=7)
    page.tab.locator("#repaint").click()
    page.tab.locator("#edit-status", has_text="Done: seed 7").wait_for()
    (options,) = given
    mask = options["mask_image"].getbbox()
    assert mask[1] >= 4 and mask[3] > 8 and mask[2] - mask[0] < 16  # painted below the middle, not from side to side
    wanted = page.engine.pipe.inpaint(
        "blue car", options["image"], options["mask_image"], generator=generators(7), **OPTIONS
    )
    page.wait_for("#edited", wanted.images[0].tobytes())


def test_oversized_uploads_are_clear_messages(page):
    """Too many bytes are refused by the server, too many pixels in few bytes by the page."""
    page.open("Describe")
    (page.folder / "heavy.png").write_bytes(bytes(9 << 20))
    page.tab.locator("#upload input[type=file]").set_input_files(page.folder / "heavy.png")
    page.message("exceed the maximum allowed size of 8.0 Mb")
    Image.new("1", (5000, 4000)).save(page.folder / "huge.png")
    page.tab.locator("#upload input[type=file]").set_input_files(page.folder / "huge.png")
    page.tab.locator("#upload img").wait_for()
    page.tab.locator("#describe").click()
    page.message("image: 5000x4000 pixels, at most 16 million are allowed here; make it smaller.")
    page.tab.locator("#upload").get_by_label("Remove Image").click()


def test_describe_writes_the_caption(page):
    page.open("Describe")
    page.tab.locator("#upload input[type=file]").set_input_files(page.folder / "image.png")
    page.tab.locator("#upload img").wait_for()
    page.set(seed=7)
    page.tab.locator("#describe").click()
    text = page.tab.locator("#description textarea")
    page.until(text.input_value)
    assert text.input_value().split() == page.expected["caption"].split()
    page.tab.locator("#describe-status", has_text="Done: seed 7").wait_for()


def test_stop_lets_a_waiting_description_go(page):
    hold = threading.Event()
    job = page.engine.alone(lambda: [hold.wait(60)])
    while page.engine._waiting:
        time.sleep(0.01)
    page.tab.locator("#describe").click()
    page.tab.locator("#describe-status", has_text="Working ...").wait_for()
    (waiting,) = page.engine._waiting
    page.tab.locator("#stop-describe").click()
    page.until(lambda: waiting.cancelled)
    assert waiting.cancelled
    hold.set()
    job.result(60)


def test_a_conversation_is_shown(page):
    """The image as the model sees it, the words, and the reply that a call gives."""
    page.open("Chat")
    page.tab.locator("#with-it input[type=file]").set_input_files(page.folder / "image.png")
    page.tab.locator("#with-it img").wait_for()
    page.set(seed=7)
    said = page.tab.locator("#said textarea")
    said.fill("red apple")
    page.tab.locator("#send").click()
    page.tab.locator("#chat-status", has_text="Done.").wait_for()
    page.until(lambda: not said.input_value())
    image = fit(Image.open(page.folder / "image.png"), (16, 16))
    page.wait_for("#conversation", image.tobytes())
    reply = page.engine.pipe.chat(
        [message("user", image, "red apple")], text_sampling=Sampling(temperature=0.85), generator=generators(7)
    )
    shown = page.tab.locator("#conversation").inner_text()
    words = "".join(part for part in ["red apple", *reply] if isinstance(part, str))
    assert [*filter(str.isalnum, shown)] == [*filter(str.isalnum, words)] and len(words) > 20


def test_mistakes_are_clear_messages(page):
    page.open("Generate")
    page.set(prompt="x" * 301, seed=7)
    page.tab.locator("#generate").click()
    page.message("prompt: 301 characters, at most 300 are allowed here; shorten it.")
    page.set(prompt="red apple")
    hold = threading.Event()
    jobs = [page.engine.alone(lambda: [hold.wait(60)])]
    while page.engine._waiting:
        time.sleep(0.01)
    jobs += [page.engine.alone(lambda: [1]) for _ in range(2)]
    page.tab.locator("#generate").click()
    page.message("queue: 2 requests are waiting, the limit is 2; try again later.")
    hold.set()
    for job in jobs:
        job.result(60)

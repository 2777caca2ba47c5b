"""The web page's server as clients meet it: hosts, paths and bounds; good and bad clients at the same time."""

import ctypes
import gc
import io
import json
import socket
import sys
import threading
import time
import zlib
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from uuid import uuid4

import psutil
import pytest
from browsing import need_gradio
from conftest import generators, tiny_pipeline
from PIL import Image

from unified.cli import main
from unified.data.crops import fit
from unified.pipeline.pipeline import UnifiedPipeline
from unified.serving.address import answered_hosts, client_of, free_port
from unified.serving.engine import Engine
from unified.serving.page import build_demo
from unified.serving.web import launch

OPTIONS = {"guidance_scale": 1.5, "temperature": 0.85}
WAIT = 60  # seconds, far more than anything here takes
JSON = {"content-type": "application/json"}


class Client:
    """What a browser or a program sends, from its own address: a proxy on this machine would report it."""

    def __init__(self, url, address="10.0.0.1"):
        import httpx

        self.http = httpx.Client(base_url=url, timeout=WAIT, headers={"X-Forwarded-For": address})
        self.address, self.session = address, uuid4().hex
        self.names = {}

    def upload(self, image, name="image.png"):
        """Upload an image or bytes; what stands for the file in a request."""
        if isinstance(image, Image.Image):
            image = png(image)
        done = self.http.post("/gradio_api/upload", files={"files": (name, image)})
        assert done.status_code == 200, done.text
        return file_of(done.json()[0])

    def join(self, name, *data):
        """Queue a request."""
        if not self.names:
            parts = self.http.get("/config").json()["dependencies"]
            self.names.update({part["api_name"]: part["id"] for part in parts})
        asked = {"data": data, "fn_index": self.names[name], "session_hash": self.session}
        assert self.http.post("/gradio_api/queue/join", json=asked).status_code == 200

    def messages(self):
        """The answers to this client."""
        with self.http.stream("GET", "/gradio_api/queue/data", params={"session_hash": self.session}) as answers:
            yield from (json.loads(line[5:]) for line in answers.iter_lines() if line.startswith("data:"))

    def ask(self, name, *data):
        """Queue a request and read on until its end: the outputs, or the error's text."""
        self.join(name, *data)
        for message in self.messages():
            if message["msg"] == "process_completed":
                output = message["output"]
                return output["data"] if message["success"] else output["error"]
        raise AssertionError("no end")

    def generate(self, prompt, seed):
        """The RGB bytes of the image for a seed, or the error's text."""
        answer = self.ask("generate", prompt, "", seed, 1, 1.5, 0.85, "plain", "none")
        return answer if isinstance(answer, str) else self.pixels(answer[0][0]["image"])

    def edit(self, background, layers, seed=7):
        canvas = {"background": background, "layers": layers, "composite": background}
        answer = self.ask("edit", "blue car", canvas, seed, 1.5, 0.85, "none")
        return answer if isinstance(answer, str) else self.pixels(answer[0])

    def describe(self, file, seed=7):
        answer = self.ask("describe", file, seed, 0.85, "none")
        return answer if isinstance(answer, str) else answer[0]

    def pixels(self, file):
        return Image.open(io.BytesIO(self.http.get(file["url"]).content)).convert("RGB").tobytes()

    def deafen(self):
        """Queue a request and open its answers, but read none until the server has none left to send."""
        self.join("generate", "red apple", "", 3, 4, 1.5, 0.85, "plain", "none")
        with self.listening() as connection:
            time.sleep(2)
            return connection.recv(1 << 20)

    def vanish(self, after):
        """Queue a request, read ``after`` answers of it, and drop the connection."""
        self.join("generate", "red apple", "", 3, 4, 1.5, 0.85, "plain", "none")
        with self.listening() as connection:
            received = b""
            while received.count(b"data:") < after:
                received += connection.recv(1 << 16)

    @contextmanager
    def listening(self):
        """A bare connection on which the answers to this client come."""
        path = f"/gradio_api/queue/data?session_hash={self.session}"
        with socket.create_connection((self.http.base_url.host, self.http.base_url.port)) as connection:
            head = f"GET {path} HTTP/1.1\r\nHost: localhost\r\nX-Forwarded-For: {self.address}\r\n\r\n"
            connection.sendall(head.encode())
            yield connection


def file_of(path):
    return {"path": path, "meta": {"_type": "gradio.FileData"}}


def png(image):
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def line_of(height):
    """A PNG of one column, much smaller than its pixels."""
    return png(Image.new("1", (1, height)))


@contextmanager
def serving(pipe, per_client=4, host="127.0.0.1", allow_hosts=(), **limits):
    """A running server: its address and engine, and the visitors."""
    need_gradio()
    with pytest.MonkeyPatch.context() as patch, closing(Engine(pipe, **limits)) as engine:
        from gradio import networking

        patch.setattr(networking, "url_ok", lambda url: True)  # gradio gives its own server 3 s
        page = build_demo(engine, per_client=per_client)
        port = free_port(host, 0)
        launch(page, host, allow_hosts, prevent_thread_lock=True, quiet=True, server_port=port)
        try:
            yield f"http://127.0.0.1:{port}", engine, page.visitors
        finally:
            page.close()


@pytest.fixture(scope="module")
def served(text_tokenizer, image_tokenizer):
    need_gradio()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("unified.serving.guard.GRACE", 2.0)
        with serving(tiny_pipeline(text_tokenizer, image_tokenizer), max_rows=4, waiting=8) as running:
            yield running


@pytest.fixture
def client(served):
    return Client(served[0])


def until(condition, seconds=WAIT):
    """Wait until something holds; returns how long that took."""
    begin = time.monotonic()
    while not condition():
        assert time.monotonic() < begin + seconds
        time.sleep(0.01)
    return time.monotonic() - begin


def idle(engine, visitors):
    return not (engine._running or engine._waiting or visitors.turns or visitors.readers)


@contextmanager
def slow_steps(engine, seconds):
    """Every step of the batch takes a while, as with a larger model."""
    with pytest.MonkeyPatch.context() as patch:
        step = engine._batcher.step
        patch.setattr(engine._batcher, "step", lambda: (time.sleep(seconds), step())[1])
        yield


@pytest.mark.process
def test_only_known_hosts_are_answered(client):
    for host, status in (("localhost", 200), ("127.0.0.1:99", 200), ("[::1]:99", 200), ("evil.example", 400),
                         ("localhost.evil.example", 400), ("192.168.1.5", 400), ("", 400)):  # fmt: skip
        assert client.http.get("/config", headers={"host": host}).status_code == status, host


@pytest.mark.process
def test_a_server_for_everybody_answers_under_addresses_and_allowed_names(pipeline):
    with serving(pipeline, host="0.0.0.0", allow_hosts=["*.example.org", "demo"]) as (url, *_):
        client = Client(url)
        for host, status in (("192.168.1.5:80", 200), ("[fe80::1]", 200), (socket.gethostname(), 200), ("demo", 200),
                             ("a.example.org", 200), ("example.com", 400), ("192.168.1.5.evil.example", 400)):  # fmt: skip
            assert client.http.get("/config", headers={"host": host}).status_code == status, host


def test_hosts_and_clients():
    assert answered_hosts("::1", ["demo"]) == ["localhost", "127.0.0.1", "[::1]", "demo"]
    for name in ("http://demo", "demo:80", "a.*.b", "demo/page", ""):
        with pytest.raises(ValueError, match=r"allow_host: .*is no host name"):
            answered_hosts("127.0.0.1", [name])
    assert client_of("2001:db8::1") == client_of("2001:db8::ffff:2") != client_of("2001:db8:0:1::1")
    assert client_of("fe80::1%eth0") == client_of("fe80::2") and client_of("10.0.0.1") != client_of("10.0.0.2")


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--host=nowhere.invalid", "host: 'nowhere.invalid' does not resolve"),
        ("--host=192.0.2.1", "host: '192.0.2.1' is not this machine"),  # an address of documentation
        ("--port=-1", "port: -1 must be a whole number from 0 to 65535"),
        ("--port=65536", "port: 65536 must be a whole number from 0 to 65535"),
        ("busy", "port: {port} of '127.0.0.1' cannot be used (Address already in use)"),
    ],
)
def test_an_address_that_cannot_be_listened_on_is_one_line(monkeypatch, capsys, option, message):
    monkeypatch.setattr(UnifiedPipeline, "from_pretrained", lambda *given, **options: pytest.fail("loaded"))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["serve", "--pipeline", "p", f"--port={port}" if option == "busy" else option]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"unified serve: {message.format(port=port)}") and error.count("\n") == 1


@pytest.mark.process
def test_routes_that_are_not_used_are_off(client):
    """Among them calls past the queue, a proxy, and blobs of an editor: a list of a thousand million items in one number."""
    blob = {
        "data": {"type": "layer", "index": 10**9, "id": "x"},
        "component_id": 1,
        "session_hash": "s",
        "fn_name": "f",
    }
    for path in ("run/generate", "api/generate", "call/generate", "call/v2/generate", "component_server",
                 "process_recording", "vibe-edit", "stream/x"):  # fmt: skip
        assert client.http.post(f"/gradio_api/{path}", json=blob).status_code == 404, path
    for path in ("gradio_api/proxy=http://localhost", "gradio_api/file=http://localhost", "gradio_api/queue/status",
                 "gradio_api/openapi.json", "monitoring", "monitoring/summary", "docs"):  # fmt: skip
        assert client.http.get(f"/{path}").status_code == 404, path
    ends = client.http.get("/gradio_api/info").json()
    assert (
        set(ends["named_endpoints"]) == {"/generate", "/edit", "/describe", "/converse"}
        and not ends["unnamed_endpoints"]
    )


@pytest.mark.process
def test_bodies_are_bounded(client):
    chunks = (bytes(1 << 16) for _ in range(64))
    assert client.http.post("/gradio_api/queue/join", content=bytes(2 << 20), headers=JSON).status_code == 413
    assert client.http.post("/gradio_api/queue/join", content=chunks, headers=JSON).status_code == 413
    assert client.http.post("/gradio_api/upload", files={"files": ("x.png", bytes(9 << 20))}).status_code == 413
    form = {"files": ("a.png", bytes(5 << 20))}, {"files": ("b.png", bytes(5 << 20))}
    both = [pair for part in form for pair in part.items()]
    assert client.http.post("/gradio_api/upload", files=both).status_code == 413


@pytest.mark.process
def test_connections_of_a_client_are_bounded():
    need_gradio()
    from unified.serving.guard import Visitors

    visitors = Visitors(1)
    with ExitStack() as stack:
        assert all(stack.enter_context(visitors.connected("2001:db8::1")) for _ in range(200))
        assert not stack.enter_context(visitors.connected("2001:db8::2"))
        assert stack.enter_context(visitors.connected("10.0.0.1"))
    assert not visitors.connections
    with visitors.reading("a"), visitors.reading("b"):
        message = "requests: 1 of yours are being answered or wait, the limit is 1"
        with visitors.turn("10.0.0.1", "a"), visitors.turn("10.0.0.2", "b"), pytest.raises(ValueError, match=message):
            visitors.turn("10.0.0.1", "b").__enter__()
        with visitors.turn("10.0.0.1", "b"):
            pass
    assert not visitors.turns and not visitors.readers


@pytest.mark.process
def test_programs_are_served_through_gradios_client(served, pipeline, tmp_path):
    from gradio_client import Client as Program
    from gradio_client import handle_file

    program = Program(served[0], verbose=False, download_files=tmp_path)
    (sampled,), about = program.predict("red apple", "", 5, 1, 1.5, 0.85, "plain", "none", api_name="/generate")
    wanted = pipeline("red apple", generator=generators(5), **OPTIONS).images[0]
    assert Image.open(sampled["image"]).convert("RGB").tobytes() == wanted.tobytes() and about.startswith("Done")
    wanted.save(tmp_path / "image.png")
    text, _ = program.predict(handle_file(tmp_path / "image.png"), 7, 0.85, "none", api_name="/describe")
    assert text == pipeline.caption(wanted, temperature=0.85, generator=generators(7)[0])[0]


@pytest.mark.process
def test_errors_hold_no_paths_of_the_server(client, served, monkeypatch, capfd):
    engine = served[1]
    empty, text = client.upload(Image.new("RGB", (8, 8))), client.upload(b"no image")
    broken = client.upload(png(Image.effect_noise((64, 64), 90))[:2000])
    wrong = "inputs: they are not what the page sends; load it again."
    unreadable = "image: cannot be read; upload a PNG, JPEG or WebP file."
    nowhere = file_of(f"{text['path']}x")
    for file, message in (
        (file_of("/etc/passwd"), wrong), (file_of("README.md"), wrong), (file_of("."), wrong), (text, unreadable),
        (nowhere, unreadable), (None, "image: none given; upload an image."),
        (file_of("http://localhost/x.png"), "file: addresses are not fetched here; upload the file."),
    ):  # fmt: skip
        assert client.describe(file) == message
        assert client.edit(file, []) == message
    assert client.describe(broken).startswith("image: cannot be read (")
    assert client.edit(empty, [broken]) == "image: a layer cannot be read; paint again."
    assert client.edit(empty, [text]) == unreadable and client.edit(empty, []).startswith("mask: nothing is painted")
    assert (
        client.generate(file_of("https://localhost/x"), 1) == "file: addresses are not fetched here; upload the file."
    )
    assert client.ask("generate", "a", "", 1, 1, "much", 0.85, "plain", "none") == wrong
    data = {"path": None, "url": "data:image/png;base64,aaaa", "meta": {"_type": "gradio.FileData"}}
    assert client.describe(data) == "image: none given; upload an image."

    def fail(*given, **options):
        raise RuntimeError("no room in /root/secret")

    monkeypatch.setattr(engine, "submit", fail)
    capfd.readouterr()
    assert client.generate("red apple", 1) == "server: something went wrong; its log says what."
    assert "no room in /root/secret" in capfd.readouterr().err
    for path in ("/gradio_api/file=README.md", "/gradio_api/file=/etc/passwd", "/assets/nothing.js", "/static/../x"):
        answer = client.http.get(path)
        assert answer.status_code in (403, 404) and "/work" not in answer.text and "site-packages" not in answer.text


@pytest.mark.process
def test_a_client_has_a_limited_number_of_requests(served):
    """Whatever sessions it uses; another client is answered meanwhile, and those that nobody reads never begin."""
    url, engine, visitors = served
    hold = threading.Event()
    job = engine.alone(lambda: [hold.wait(WAIT)])
    until(lambda: not engine._waiting)
    greedy = [Client(url) for _ in range(4)]
    threads = [threading.Thread(target=each.generate, args=("red apple", 1)) for each in greedy]
    for thread in threads:
        thread.start()
    until(lambda: len(engine._waiting) == 4)
    message = "requests: 4 of yours are being answered or wait, the limit is 4; stop one, or try again later."
    assert Client(url).generate("red apple", 1) == message
    unread = [Client(url, "10.0.0.2") for _ in range(4)]
    for each in unread:
        each.join("generate", "red apple", "", 1, 1, 1.5, 0.85, "plain", "none")
    until(lambda: visitors.turns["10.0.0.2"] == 4)
    time.sleep(0.5)
    assert len(engine._waiting) == 4  # those that nobody reads take no place
    others = [Client(url, f"10.0.0.{number}") for number in range(3, 7)]
    heard = []
    asked = [threading.Thread(target=lambda each=each: heard.append(each.generate("red apple", 1))) for each in others]
    for thread in asked:
        thread.start()
    until(lambda: len(engine._waiting) == 8)
    hold.set()
    for thread in (*threads, *asked):
        thread.join(WAIT)
    job.result(WAIT)
    assert len(heard) == 4 and len(set(heard)) == 1 and isinstance(heard[0], bytes)
    until(lambda: idle(engine, visitors), 10)


@pytest.mark.process
@pytest.mark.parametrize("after", [1, 3, 5])
def test_requests_of_clients_that_are_gone_end(served, after):
    """Gone while they wait for the batch, at the first words, or in the middle of the image."""
    url, engine, visitors = served
    hold = threading.Event()
    if after == 3:
        engine.alone(lambda: [hold.wait(WAIT)])
        until(lambda: not engine._waiting)
    with slow_steps(engine, 0.5):  # 16 s for all four images, two at a time
        Client(url).vanish(after)
        if after == 3:
            until(lambda: all(job.cancelled for job in engine._waiting))
        hold.set()
        until(lambda: idle(engine, visitors), 8)


def bad_requests():
    """Requests that are refused, each as a function of a client that returns what it heard."""
    line, huge = line_of(200_000), png(Image.new("1", (5000, 4000)))
    assert len(line) < 500 and len(huge) < 5000
    small = Image.new("RGBA", (16, 16), "red")

    def layers(client):
        return client.edit(client.upload(small), [client.upload(small)] * 5)

    def large_layer(client):
        return client.edit(client.upload(small), [client.upload(huge)])

    return [
        (lambda client: client.describe(client.upload(line)), "image: 1x200000 pixels, at most 16384"),
        (lambda client: client.edit(client.upload(line), []), "image: 1x200000 pixels, at most 16384"),
        (lambda client: client.describe(client.upload(huge)), "image: 5000x4000 pixels, at most 16 million"),
        (large_layer, "image: 5000x4000 pixels, at most 16 million"),
        (layers, "image: 5 layers, at most 4 are allowed here"),
        (lambda client: client.generate("x" * 301, 1), "prompt: 301 characters, at most 300"),
        (lambda client: client.describe(client.upload(zlib.compress(bytes(10**7)))), "image: cannot be read"),
    ]


@pytest.mark.process
def test_many_clients_good_and_bad(text_tokenizer, image_tokenizer, image_of_edit):
    """Thirty at once: the good ones get what the pipeline gives alone, and of the others nothing is left."""
    pipe = tiny_pipeline(text_tokenizer, image_tokenizer)
    background, layer = image_of_edit
    mask = layer.getchannel("A").resize((16, 16)).point(lambda a: 255 if a > 64 else 0)
    plain = fit(background, (16, 16))
    expected = {
        seed: pipe("red apple", generator=generators(seed), **OPTIONS).images[0].tobytes() for seed in range(12)
    }
    edited = pipe.inpaint("blue car", plain, mask, generator=generators(7), **OPTIONS).images[0].tobytes()
    caption = pipe.caption(plain, temperature=0.85, generator=generators(7)[0])[0]
    heavy = png(Image.new("RGBA", (4000, 4000), (255, 0, 0, 128)))  # as large as allowed
    memory = psutil.Process().memory_info

    def without_leftovers():
        """Bytes in use, after the allocator has given back what it keeps for later."""
        gc.collect()
        if sys.platform == "linux":
            ctypes.CDLL(None).malloc_trim(0)
        return memory().rss

    heard, failures, most = {}, [], [0]

    def call(number, act):
        try:
            heard[number] = act(Client(url, f"10.0.1.{number}"))
        except Exception as error:
            failures.append((number, error))

    def watch():
        while threads_left.is_set():
            most[0] = max(most[0], memory().rss)
            time.sleep(0.02)

    with serving(pipe, max_rows=4, waiting=32) as (url, engine, visitors), slow_steps(engine, 0.01):
        first = Client(url)  # loads what is loaded once
        assert first.generate("red apple", 0) == expected[0] and first.describe(first.upload(plain)) == caption
        until(lambda: idle(engine, visitors))
        before = memory().rss
        assert isinstance(first.edit(first.upload(heavy), [first.upload(heavy)]), bytes)
        settled = without_leftovers()
        acts = {
            f"good {seed}": partial(lambda client, seed: client.generate("red apple", seed), seed=seed)
            for seed in expected
        }
        acts["edit"] = lambda client: client.edit(client.upload(background), [client.upload(layer)])
        acts["describe"] = lambda client: client.describe(client.upload(background))
        bad = bad_requests()
        acts |= {f"bad {i}": act for i, (act, _) in enumerate(bad)}
        for i in range(2):
            acts[f"heavy {i}"] = lambda client: client.edit(client.upload(heavy), [client.upload(heavy)] * 4)
            acts[f"unread {i}"] = lambda client: client.join("generate", "a cat", "", 3, 4, 1.5, 0.85, "plain", "none")
        acts |= {f"gone {after}": partial(Client.vanish, after=after) for after in (1, 2, 3, 5)}
        acts["deaf"] = Client.deafen
        assert len(acts) == 30
        threads = [threading.Thread(target=call, args=(number, act)) for number, act in enumerate(acts.values())]
        threads_left = threading.Event()
        threads_left.set()
        watching = threading.Thread(target=watch)
        watching.start()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(WAIT)
        assert not failures and not any(thread.is_alive() for thread in threads)
        until(lambda: idle(engine, visitors), 10)
        threads_left.clear()
        watching.join()
        answers = dict(zip(acts, (heard[number] for number in range(30)), strict=True))
        assert {seed: answers[f"good {seed}"] for seed in expected} == expected
        assert answers["edit"] == edited and answers["describe"] == caption
        for i, (_, message) in enumerate(bad):
            assert answers[f"bad {i}"].startswith(message)
        assert all(isinstance(answers[f"heavy {i}"], bytes) for i in range(2))
        begin = time.monotonic()
        assert Client(url, "10.0.2.1").generate("red apple", 3) == expected[3]
        took = time.monotonic() - begin
        peak, grown = (most[0] - before) / 2**20, (without_leftovers() - settled) / 2**20
        print(f"MB: {peak:.0f} more at most, {grown:.0f} more afterwards; {took:.2f} s for one more client")
        assert sorted(engine._batcher.free) == [0, 1, 2, 3] and took < 5
        assert peak < 450 and grown < 100  # one image of 16 million pixels at a time, and nothing of it afterwards


@pytest.fixture
def image_of_edit():
    """A background and a layer that is painted on its lower half."""
    layer = Image.new("RGBA", (64, 64))
    layer.paste((255, 0, 0, 255), (0, 32, 64, 64))
    return Image.effect_mandelbrot((64, 64), (-2, -1, 1, 1), 50).convert("RGB"), layer

"""The page before another engine's server: the pipeline's own images, progress, and what a server cannot do or fails at."""

import logging
import threading
from concurrent.futures import CancelledError
from contextlib import ExitStack, closing, contextmanager, nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from browsing import need_gradio
from PIL import Image
from test_remote import Server, exported, guided, running, unguided  # noqa: F401  a fixture

from unified.cli import main
from unified.pipeline.arguments import seeded
from unified.pipeline.metadata import read_image_metadata
from unified.pipeline.options import GenerationOptions
from unified.serving import remote, web
from unified.serving.page import build_demo
from unified.serving.remote import RemotePipeline
from unified.serving.remote_engine import RemoteEngine

GREEDY = GenerationOptions(top_k=1, guidance_scale=1.0)
PAIR = GenerationOptions(top_k=1, guidance_scale=1.0, num_images_per_prompt=2)
REQUEST = SimpleNamespace(client=SimpleNamespace(host="here"), session_hash="x")


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(remote, "WAIT", 0.001)


@contextmanager
def serving(folder, sample=unguided, waiting=8, **options):
    """A server and an engine that asks it."""
    server = Server(folder, sample)
    options = {"concurrency": 2, "retries": 2, **options}
    with (
        running(server) as url,
        RemotePipeline(folder, url, **options) as pipe,
        closing(RemoteEngine(pipe, waiting)) as engine,
    ):
        server.bodies.clear()
        yield server, engine


class Held:
    """An answer that waits: ``begun`` once the server is asked, until ``free``."""

    def __init__(self, server):
        self.begun, self.free = threading.Semaphore(0), threading.Semaphore(0)
        server.changes = self

    def __call__(self, found):
        self.begun.release()
        assert self.free.acquire(timeout=20)
        return {}


@pytest.mark.process
@pytest.mark.parametrize(("sample", "scale"), [(unguided, 1.0), (guided, 3.0), (guided, 1.0)])
def test_images_are_the_pipelines_with_or_without_guidance(exported, sample, scale):  # noqa: F811
    """A guided server gives the images without guidance, too."""
    pipe, folder = exported
    options = GenerationOptions(num_images_per_prompt=2, top_k=1, guidance_scale=scale)
    with serving(folder, sample) as (server, engine):
        assert engine.guided == (sample is guided)
        found = engine.submit(["red apple", "blue car"], options, generator=seeded(5, 4)).result(60)
    wanted = pipe(["red apple", "blue car"], num_images_per_prompt=2, top_k=1, guidance_scale=scale)
    assert torch.equal(found.codes, wanted.codes) and sorted(body["seed"] for body in server.bodies) == [5, 6, 7, 8]
    assert all(np.array_equal(a, b) for a, b in zip(found.images, wanted.images, strict=True))


def test_images_of_callers_come_as_they_are_complete(exported):  # noqa: F811
    """Two requests are under way at once, whoever asks; a state for each image, grey where there is none yet."""
    with serving(exported[1], concurrency=1) as (server, engine):
        held = Held(server)
        first = engine.submit("red apple", PAIR, generator=seeded(0, 2))
        second = engine.submit("blue car", GREEDY, generator=seeded(0, 1))
        assert (first.ahead, second.ahead) == (0, 1)
        held.free.release()
        state = next(first.previews())
        assert [bool((codes >= 0).all()) for codes in state.codes] == [True, False] and len(state.images) == 2
        assert set(state.images[1].get_flattened_data()) == {(128, 128, 128)}
        held.free.release(2)
        wanted = exported[0](["red apple", "blue car"], top_k=1, guidance_scale=1.0).codes
        assert torch.equal(first.result(20).codes[1], wanted[0]) and torch.equal(second.result(20).codes[0], wanted[1])
        assert server.most == 1


def test_a_cancelled_job_asks_no_further(exported):  # noqa: F811
    with serving(exported[1], concurrency=1, waiting=1) as (server, engine):
        held = Held(server)
        first = engine.submit("red apple", PAIR, generator=seeded(0, 2))
        assert held.begun.acquire(timeout=20)
        with pytest.raises(ValueError, match="queue: 1 requests are waiting, the limit is 1"):
            engine.submit("blue car", GREEDY, generator=seeded(0, 1))
        first.cancel()
        second = engine.submit("blue car", GREEDY, generator=seeded(0, 1))
        assert second.ahead == 0
        held.free.release(2)
        with pytest.raises(CancelledError):
            first.result(20)
        second.result(20)
        assert len(server.bodies) == 2
        last = engine.submit("blue car", GREEDY, generator=seeded(0, 1))
        assert held.begun.acquire(timeout=20) and held.begun.acquire(timeout=20)
        engine.close()
        with pytest.raises(CancelledError):
            last.result(20)
        held.free.release()
        with pytest.raises(ValueError, match="engine: it is closed"):
            engine.submit("blue car", GREEDY, generator=seeded(0, 1))


@pytest.mark.parametrize(
    ("changes", "delay", "words"),
    [
        ((500, b"trace of /srv/secret"), 0, "server: the engine refuses the request or answers in a wrong way; the page's log"),
        ({"token_ids": [1]}, 0, "server: the engine refuses the request or answers in a wrong way; the page's log"),
        ({}, 0.6, r"server: the engine did not answer in 0.2 seconds; ask for fewer images, or try again later\."),
        (None, 0, r"server: the engine cannot be reached; try again later\."),
    ],
    ids=str,
)  # fmt: skip
def test_failures_are_words_without_the_servers_own(exported, caplog, changes, delay, words):  # noqa: F811
    """The log has the address and what the server says; callers do not."""
    with ExitStack() as stack:
        server, engine = stack.enter_context(serving(exported[1]))
        if changes is None:
            engine.pipe.url = "http://127.0.0.1:9"
        engine.pipe._http.timeout = engine.pipe.timeout = 0.2
        server.changes, server.delay = changes, delay
        job = engine.submit("red apple", PAIR, generator=seeded(0, 2))
        with caplog.at_level(logging.WARNING), pytest.raises(ValueError, match=words) as caught:
            job.result(20)
    assert "127.0.0.1" not in str(caught.value) and "secret" not in str(caught.value)
    assert "server: http://127.0.0.1:" in caplog.text


def test_a_busy_server_is_told(exported):  # noqa: F811
    with serving(exported[1]) as (server, engine):
        held = Held(server)
        server.failures = [(503, b"starting"), (429, b"busy")]
        job = engine.submit("red apple", GREEDY, generator=seeded(0, 1))
        assert held.begun.acquire(timeout=20)
        assert job.note == "The engine is busy (503); asked again (2 of 2)."
        held.free.release()
        job.result(20)
        assert job.note == ""


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"options": {"guidance_scale": 3.0}}, "guidance_scale: 3, the engine behind this page samples without guidance; give 1"),
        ({"options": {"decoding": "jacobi"}}, "decoding: 'jacobi', a server decodes in its own way"),
        ({"adapter": "outline"}, "adapter: the engine behind this page has none"),
        ({"negative_prompt": "blue"}, "negative_prompt: the engine behind this page has none"),
        ({"prompt": "red " * 200}, "prompt: .* tokens, the model has room for"),
    ],
    ids=str,
)  # fmt: skip
def test_what_the_server_cannot_do_is_refused(exported, given, words):  # noqa: F811
    with serving(exported[1]) as (server, engine):
        options = GenerationOptions(**{"guidance_scale": 1.0, **given.get("options", {})})
        with pytest.raises(ValueError, match=words):
            engine.submit(**{"prompt": "a", **given, "options": options, "generator": seeded(0, 1)})
        with pytest.raises(ValueError, match="generates images for prompts and nothing else"):
            engine.alone(list)
        assert not server.bodies


def test_a_server_of_another_model_is_refused_at_once(exported):  # noqa: F811
    server = Server(exported[1])
    server.changes = {"token_ids": [1]}
    with (
        running(server) as url,
        RemotePipeline(exported[1], url) as pipe,
        pytest.raises(ValueError, match="answers with the token 1, codes are"),
    ):
        RemoteEngine(pipe)


@pytest.mark.process
@pytest.mark.parametrize("sample", [unguided, guided])
def test_the_page_shows_what_the_server_can_do(exported, tmp_path, monkeypatch, sample):  # noqa: F811
    need_gradio()
    from gradio.exceptions import Error

    monkeypatch.setattr("unified.serving.guard.Visitors.turn", lambda self, *given: nullcontext())
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr("unified.serving.desk.PATIENCE", 0.02)
    with serving(exported[1], sample) as (server, engine):
        page = build_demo(engine)
        functions = {each.name: each.fn for each in page.fns.values()}
        scale = 2.0 if sample is guided else 1.0
        server.failures, server.delay = [(503, b"starting")], 0.2
        states = list(functions["generate"]("red apple", "", 7, 2, scale, 0.5, "plain", "none", REQUEST))
        engine.pipe.config.null_prompt = "yellow sun"
        with pytest.raises(Error, match="guidance_scale: "):
            list(functions["generate"]("red apple", "", 7, 1, 3.0, 0.5, "plain", "none", REQUEST))
        Image.new("RGB", (20, 20), "red").save(tmp_path / "red.png")
        red = str(tmp_path / "red.png")
        for name, given in (
            ("edit", ("blue car", (red, [red]), 0, 1.0, 1.0, "none")),
            ("describe", (red, 0, 1.0, "none")),
            ("converse", ("red apple", None, [], 0, 1.0, "none")),
        ):
            with pytest.raises(Error, match="server: the engine behind this page generates images for prompts"):
                list(functions[name](*given, REQUEST))
    shown, status = states[-1]
    assert status == f"Done: guidance {scale:g}, temperature 0.5, LoRA none."
    assert [caption for _, caption in shown] == ["seed 7", "seed 8"]
    told = [state[1] for state in states if isinstance(state[1], str)]
    assert (
        told[0] == "Working ..."
        and "The engine is busy (503); asked again (1 of 2)." in told
        and "Generating ... 50%" in told
    )
    about = read_image_metadata(shown[0][0])
    assert about["prompt"] == "red apple" and "seed" not in about and about["settings"]["temperature"] == 0.5
    blocks = {block.elem_id or getattr(block, "label", None): block for block in page.blocks.values()}
    hidden = {name for name in ("Edit", "Describe", "Chat", "negative", "decoding", "lora") if not blocks[name].visible}
    assert hidden == {"Edit", "Describe", "Chat", "negative", "decoding", "lora"}
    assert blocks["Generate"].visible and blocks["guidance"].visible == (sample is guided)


@pytest.mark.process
def test_command_line(exported, tmp_path, monkeypatch, capsys):  # noqa: F811
    need_gradio()
    engines, pages, make = [], [], build_demo
    monkeypatch.setattr(web, "build_demo", lambda engine, **given: engines.append(engine) or make(engine, **given))
    monkeypatch.setattr(web, "launch", lambda page, **options: pages.append((page, options)))
    monkeypatch.setenv("UNIFIED_API_KEY", "secret")
    server, command = Server(exported[1]), ["serve", "--pipeline", str(exported[1]), "--port", "0", "--server"]
    with running(server) as url:
        assert main([*command, url, "--queue", "5", "--per-client", "2", "--max-rows", "3", "--password", "x"]) == 0
        assert main([*command, url, "--loras", str(tmp_path)]) == 2
    assert main([*command, "localhost"]) == 2
    assert "loras: it cannot be chosen for a server" in capsys.readouterr().err
    ((page, options),) = pages
    assert (engines[0].limit, engines[0].pipe.concurrency, page.visitors.limit) == (5, 3, 2)
    assert options["password"] == "x" and options["server_port"] > 0 and set(server.keys) == {"Bearer secret"}

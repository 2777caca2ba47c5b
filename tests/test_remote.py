"""Images from another engine's server: the pipeline's own codes, and every way in which a server can disappoint."""

import json
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from conftest import CAPTIONS, one_dimensional
from transformers import AutoModelForCausalLM

from unified import UnifiedPipeline, read_image_metadata
from unified.cli import main
from unified.pipeline.options import GenerationOptions
from unified.serving import remote
from unified.serving.export import EXPORT_FILE, export_pipeline
from unified.serving.remote import RemotePipeline
from unified_vllm.streams import two_streams

GREEDY = {"top_k": 1, "guidance_scale": 1.0}


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(remote, "WAIT", 0.001)


@pytest.fixture(scope="module")
def exported(text_tokenizer, image_tokenizer, tmp_path_factory):
    """A pipeline and the folder of its export."""
    from conftest import tiny_pipeline

    folder = tmp_path_factory.mktemp("remote")
    pipe = one_dimensional(tiny_pipeline(text_tokenizer, image_tokenizer), folder / "pipe")
    pipe.model.config.prompt_template = "the {prompt}"
    export_pipeline(pipe, folder / "out")
    return pipe, folder / "out"


def unguided(model, about, body):
    """Greedy ids among those that are allowed."""
    ids, allowed = list(body["prompt"]), torch.tensor(body["allowed_token_ids"])
    for _ in range(body["max_tokens"]):
        ids.append(int(allowed[model(torch.tensor([ids])).logits[0, -1, allowed].argmax()]))
    return ids[len(body["prompt"]) :]


def guided(model, about, body):
    """Greedy ids of the two streams that the plugin makes of a prompt, with plain masks."""
    ids, first, size = list(body["prompt"]), about["first_code"], about["codebook_size"]
    scale, codes = body["vllm_xargs"]["guidance_scale"], slice(first, first + size)
    for _ in range(body["max_tokens"]):
        given = torch.tensor(ids)
        streams = two_streams(
            given, torch.arange(len(ids)), first + size, first, about["boi_token_id"], about["bos_token_id"]
        )
        rows, positions, hidden = (each.view(2, -1) for each in (streams.ids, streams.positions, streams.hidden))
        shown = (torch.ones(len(ids), len(ids)).tril() > 0) & ~hidden[:, None] | torch.eye(len(ids), dtype=torch.bool)
        bias = torch.zeros(2, 1, len(ids), len(ids)).masked_fill(~shown[:, None], float("-inf"))
        c, u = model(rows, attention_mask=bias, position_ids=positions).logits[:, -1, codes]
        ids.append(first + int((u + scale * (c - u)).argmax()))
    return ids[len(body["prompt"]) :]


class Server:
    """An engine's server on the loopback.

    Attributes:
        changes: what differs in an answer of completions, a dict or a function of the body; or a pair of status and content.
        bodies: what it was asked; keys: authorizations; most: requests that were under way at once.
    """

    def __init__(self, folder, sample=unguided):
        self.model = AutoModelForCausalLM.from_pretrained(folder).eval()
        self.about = json.loads((folder / EXPORT_FILE).read_text())
        self.sample, self.listed = sample, {"data": [{"id": "mine", "max_model_len": 128}]}
        self.changes, self.failures, self.delay = {}, [], 0.0
        self.bodies, self.keys, self.most, self.running, self.lock = [], [], 0, 0, threading.Lock()

    def answer(self, path, body):
        if path == "/v1/models":
            return 200, self.listed
        if ("vllm_xargs" in body) != (self.sample is guided):
            return 400, {"error": {"message": "guidance"}}
        with self.lock:
            self.bodies.append(body)
            self.running += 1
            self.most = max(self.most, self.running)
            failure = self.failures.pop() if self.failures else None
        try:
            time.sleep(self.delay)
            if failure is not None:
                return failure
            if isinstance(self.changes, tuple):
                return self.changes
            with torch.no_grad():
                found = {"token_ids": self.sample(self.model, self.about, body), "prompt_token_ids": body["prompt"]}
            changes = self.changes(found) if callable(self.changes) else self.changes
            return 200, {"choices": [{**found, **changes}]}
        finally:
            with self.lock:
                self.running -= 1


@contextmanager
def running(server):
    """Address of a server while it answers."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self, body=None):
            server.keys.append(self.headers.get("Authorization"))
            status, content = server.answer(self.path, body)
            data = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def do_POST(self):
            self.do_GET(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{http.server_address[1]}"
        finally:
            http.shutdown()
            thread.join()


@pytest.mark.process
@pytest.mark.parametrize(("sample", "scale"), [(unguided, 1.0), (guided, 3.0)])
def test_codes_and_images_are_the_pipelines(exported, sample, scale):
    pipe, folder = exported
    server = Server(folder, sample)
    server.delay = 0.02
    options = GenerationOptions(num_images_per_prompt=2, top_k=1, guidance_scale=scale)
    with running(server) as url, RemotePipeline(folder, url + "/v1/", concurrency=2, api_key="secret") as there:
        found = there(CAPTIONS[:3], options, seed=5)
    wanted = pipe(CAPTIONS[:3], num_images_per_prompt=2, top_k=1, guidance_scale=scale)
    assert torch.equal(found.codes, wanted.codes)
    assert all(np.array_equal(a, b) for a, b in zip(found.images, wanted.images, strict=True))
    assert server.most == 2 and set(server.keys) == {"Bearer secret"}
    assert sorted(body["seed"] for body in server.bodies) == [5, 6, 7, 8, 9, 10]
    assert {(body["model"], body["temperature"], body["ignore_eos"]) for body in server.bodies} == {("mine", 0.0, True)}


def test_a_server_that_checks_no_ids_is_not_asked_for_guidance(exported):
    """vLLM without a tokenizer takes any id: the null token of a guided prompt would be one more token."""
    server = Server(exported[1])
    with (
        running(server) as url,
        RemotePipeline(exported[1], url) as there,
        pytest.raises(
            ValueError, match=r"guidance_scale: http://.* samples without guidance\. Guidance needs a server"
        ),
    ):
        there("red apple", GenerationOptions(top_k=1, guidance_scale=3.0))
    assert [body["max_tokens"] for body in server.bodies] == [1]


def test_guidance_changes_the_codes(exported):
    """The test above would pass with any scale otherwise."""
    pipe, _ = exported
    first, second = (pipe(CAPTIONS[:3], top_k=1, guidance_scale=scale).codes for scale in (1.0, 3.0))
    assert not torch.equal(first, second)


def test_a_busy_server_is_asked_again(exported):
    pipe, folder = exported
    server = Server(folder)
    server.failures = [(503, b"starting"), (429, {"error": {"message": "busy"}})]
    with running(server) as url, RemotePipeline(folder, url, retries=2) as there:
        codes = there("red apple", GenerationOptions(**GREEDY)).codes
        assert len(server.bodies) == 3 and torch.equal(codes, pipe("red apple", **GREEDY).codes)
        server.failures = [(503, b"starting")] * 9
        with pytest.raises(ValueError, match=r"server: http://.* refuses /v1/completions \(503\): starting\."):
            there("red apple", GenerationOptions(**GREEDY))
        assert len(server.bodies) == 6


@pytest.mark.process
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"token_ids": [288] * 15}, "answers with 15 codes, asked were 16"),
        ({"token_ids": [288] * 15 + [308]}, "token 308, codes are 288 to 307; it serves another model"),
        ({"token_ids": [287] * 16}, "token 287, codes are 288 to 307"),
        ({"token_ids": None}, "answers without token_ids; it must know `return_token_ids`"),
        ({"token_ids": [288.0] * 16}, "answers without token_ids"),
        ({"prompt_token_ids": [1, 2]}, r"read the prompt \[1, 2\], sent was \[1, 276, 281, 264, 262"),
        ((400, {"error": {"message": "bad\nids."}}), r"refuses /v1/completions \(400\): bad ids\. A server with guidance"),
        ((401, {"error": "Unauthorized"}), r"\(401\): Unauthorized\."),
        ((200, b"<html>"), "answers /v1/completions with no JSON"),
        ((200, b"[" * 100_000), "answers /v1/completions with no JSON"),
        ((200, [1]), r"answers /v1/completions with \[1\]"),
        ((200, {"choices": []}), "answers without token_ids"),
    ],
    ids=str,
)  # fmt: skip
def test_a_wrong_answer_is_one_error(exported, changes, words):
    server = Server(exported[1])
    server.changes = changes
    with running(server) as url, RemotePipeline(exported[1], url) as there, pytest.raises(ValueError, match=words):
        there(["red apple", "blue car"], GenerationOptions(**GREEDY))


def test_a_server_that_is_away_slow_or_small(exported):
    server = Server(exported[1])
    with running(server) as url, RemotePipeline(exported[1], url, timeout=0.2) as there:
        server.delay = 0.6
        with pytest.raises(TimeoutError, match=r"did not answer in 0.2 seconds"):
            there("red apple", GenerationOptions(**GREEDY))
        server.listed["data"][0]["max_model_len"] = 20
        with pytest.raises(ValueError, match="takes 20 tokens, 29 are needed"):
            there("red apple", GenerationOptions(**GREEDY))
        server.listed = {"models": []}
        with pytest.raises(ValueError, match="lists no models"):
            there("red apple", GenerationOptions(**GREEDY))
    with (
        RemotePipeline(exported[1], url, retries=1) as there,
        pytest.raises(ConnectionError, match="cannot be reached"),
    ):
        there("red apple")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"guidance_schedule": "linear"}, "guidance_schedule: 'linear', a server knows 'constant' alone"),
        ({"decoding": "jacobi"}, "decoding: 'jacobi', a server decodes in its own way"),
        ({"height": 8}, "height, width: 8x16 is not a size"),
    ],
    ids=str,
)
def test_what_a_server_cannot_do_is_refused_before_it_is_asked(exported, given, words):
    with RemotePipeline(exported[1], "http://127.0.0.1:9") as there, pytest.raises(ValueError, match=words):
        there("red apple", GenerationOptions(**given))


def test_guidance_away_from_a_text_is_refused(exported):
    """A server's unconditional side is the empty prompt."""
    with RemotePipeline(exported[1], "http://127.0.0.1:9") as there:
        there.config.null_prompt = "yellow sun"
        with pytest.raises(
            ValueError, match="guidance_scale: a server steers away from an empty prompt, the model from 'yellow"
        ):
            there("red apple", GenerationOptions(guidance_scale=2.0))


@pytest.mark.parametrize("url", ["", "localhost:8000", "file:///etc/passwd", "http://", 5])
def test_addresses_that_are_none(exported, url):
    with pytest.raises(ValueError, match=r"server: .* is no address; give one such as"):
        RemotePipeline(exported[1], url)


def test_folders_that_are_no_export(exported, tmp_path):
    with pytest.raises(ValueError, match=r"has no unified.json; give a folder written by `unified export`"):
        RemotePipeline(tmp_path, "http://127.0.0.1:9")
    about = json.loads((exported[1] / EXPORT_FILE).read_text())
    (tmp_path / "config.json").write_bytes((exported[1] / "config.json").read_bytes())
    for content, words in (
        ("[]", "holds a list"),
        ("{}", "lacks first_code, codebook_size"),
        (
            json.dumps({**about, "codebook_size": 21}),
            "has 308 tokens, unified.json first_code 288 and codebook_size 21",
        ),
    ):
        (tmp_path / EXPORT_FILE).write_text(content)
        with pytest.raises(ValueError, match=words):
            RemotePipeline(tmp_path, "http://127.0.0.1:9")


def test_command_writes_images_of_a_server(exported, tmp_path, capsys, monkeypatch):
    pipe, folder = exported
    monkeypatch.setenv("UNIFIED_API_KEY", "secret")
    server = Server(folder)
    with running(server) as url:
        command = ["generate", "--pipeline", folder, "--server", url, "--prompt", "red apple", "--top-k", 1]
        threads = []
        monkeypatch.setattr(torch, "set_num_threads", threads.append)
        assert main([*map(str, [*command, "--guidance-scale", 1, "--threads", 3, "--out", tmp_path])]) == 0
        assert threads == [3]
        for option, value in (("lora", "x"), ("dtype", "float32")):
            assert main([*map(str, [*command, f"--{option}", value, "--out", tmp_path])]) == 2
            assert f"{option}: it cannot be chosen for a server" in capsys.readouterr().err
    about = read_image_metadata(tmp_path / "000-red-apple.png")
    assert about["prompt"] == "red apple" and about["settings"]["top_k"] == 1 and "seed" not in about
    assert set(server.keys) == {"Bearer secret"}
    assert isinstance(pipe, UnifiedPipeline) and len(list(tmp_path.iterdir())) == 1

"""An exported model in vLLM: the pipeline's greedy codes, with guidance and without. Needs its own environment."""

import json
import os
import subprocess
import time
import urllib.request
import warnings
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
import torch
from conftest import CAPTIONS, ROOT, one_dimensional

from unified.pipeline.arguments import seeded
from unified.pipeline.options import GenerationOptions
from unified.serving.address import free_port
from unified.serving.export import export_pipeline
from unified.serving.remote import RemotePipeline
from unified.serving.remote_engine import RemoteEngine
from unified_vllm.__main__ import command
from unified_vllm.export import guided_overrides
from unified_vllm.streams import two_streams

PYTHON = os.environ.get("UNIFIED_VLLM_PYTHON")
ENGINE = ROOT / "engines" / "unified_vllm"
PROMPTS = [*CAPTIONS, "red car", "a cat and a dog and a green tree and the small dog"]


@pytest.fixture
def python():
    """The engine's interpreter; without one a test is skipped, and the run says why."""
    if PYTHON is None:
        reason = (
            "vLLM was not tested: make an environment with engines/unified_vllm/setup_cpu.sh, set UNIFIED_VLLM_PYTHON."
        )
        warnings.warn(reason, stacklevel=1)
        pytest.skip(reason)
    assert Path(PYTHON).is_file(), f"UNIFIED_VLLM_PYTHON: {PYTHON!r} is no file."
    return PYTHON


def exported(pipeline, folder):
    """A pipeline whose heads have a size that vLLM's kernels know, and its export."""
    pipe = one_dimensional(pipeline, folder / "pipe", hidden_size=64, num_attention_heads=2)
    export_pipeline(pipe, folder / "out")
    return pipe, folder / "out", json.loads((folder / "out" / "unified.json").read_text())


def in_engine(python, folder, rows, options=None, **request):
    """Greedy codes of the engine in its own process, and how many tokens of each row it had already."""
    (folder / "requests.json").write_text(json.dumps({"rows": rows, "max_tokens": 16, **request}))
    given = [] if options is None else [json.dumps(options)]
    script = [python, ENGINE / "generate_codes.py", folder, folder / "requests.json", folder / "codes.json", *given]
    done = subprocess.run([*map(str, script)], capture_output=True, text=True, env=environment())
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((folder / "codes.json").read_text())
    return found["codes"], found["cached_tokens"]


def environment():
    """Without this project's paths, whose packages the engine must not import."""
    return {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "OMP_NUM_THREADS")}


@pytest.mark.process
def test_greedy_codes(python, pipeline, tmp_path):
    pipe, folder, about = exported(pipeline, tmp_path)
    rows = [[about["bos_token_id"], *pipe.text_tokenizer.encode(text), about["boi_token_id"]] for text in PROMPTS]
    wanted = pipe(PROMPTS, guidance_scale=1.0, top_k=1, output_type="codes").codes
    assert in_engine(python, folder, rows)[0] == wanted.flatten(1).tolist()


@pytest.mark.process
def test_guided_codes_in_chunks_and_with_shared_blocks(python, pipeline, tmp_path):
    """Prompts longer than what a step takes, with the same beginnings longer than a block of the cache."""
    pipe, folder, about = exported(pipeline, tmp_path)
    start, texts = " ".join(["a cat and a dog"] * 5), ["red", "red apple", "blue car", "red apple"]
    prompts = [*PROMPTS[:4], *(f"{start} {text}" for text in texts)]
    null = about["first_code"] + about["codebook_size"]
    rows = [[about["bos_token_id"], *pipe.text_tokenizer.encode(text), null, about["boi_token_id"]] for text in prompts]
    assert max(map(len, rows)) > 48
    wanted = pipe(prompts, guidance_scale=3.0, top_k=1, output_type="codes").codes
    options = {"max_num_batched_tokens": 24, "max_num_seqs": 3, "enable_prefix_caching": True, "block_size": 32}
    codes, cached = in_engine(python, folder, rows, options, guidance_scale=3.0)
    assert codes == wanted.flatten(1).tolist()
    assert cached[:4] == [0] * 4 and cached[-1] >= 32


@contextmanager
def serving(started):
    """Address of a server that was started with a command, once it answers."""
    port = free_port("127.0.0.1", 0)
    url, given = f"http://127.0.0.1:{port}", {**environment(), "VLLM_CPU_KVCACHE_SPACE": "1"}
    options = ["--host", "127.0.0.1", "--port", str(port), "--dtype", "float32"]
    with subprocess.Popen(
        [*started, *options], env=given, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as server:
        try:
            for _ in range(1200):
                assert server.poll() is None, "the server has ended"
                try:
                    urllib.request.urlopen(f"{url}/health", timeout=5).close()
                    break
                except OSError:
                    time.sleep(1)
            yield url
        finally:
            server.terminate()


@pytest.mark.process
def test_a_guided_server_answers_the_client(python, pipeline, tmp_path):
    """Two scales in one batch; a request without a scale is refused, not sampled without guidance."""
    pipe, folder, _ = exported(pipeline, tmp_path)
    with serving([python, "-m", "unified_vllm", str(folder)]) as url, RemotePipeline(folder, url) as there:
        for scale in (3.0, 1.5):
            found = there(PROMPTS, GenerationOptions(top_k=1, guidance_scale=scale))
            wanted = pipe(PROMPTS, top_k=1, guidance_scale=scale, output_type="codes")
            assert torch.equal(found.codes, wanted.codes)
        sampled = [there("red apple", GenerationOptions(temperature=2.0), seed).codes for seed in (1, 1, 2)]
        assert torch.equal(sampled[0], sampled[1]) and not torch.equal(sampled[0], sampled[2])
        with pytest.raises(ValueError, match=r"guidance_scale: None in vllm_xargs must be a number"):
            there("red apple", GenerationOptions(guidance_scale=1.0))
        with closing(RemoteEngine(there)) as engine:  # the page's, which finds out what the server takes
            assert engine.guided
            found = engine.submit("red apple", GenerationOptions(top_k=1, guidance_scale=1.0), generator=seeded(0, 1))
            wanted = pipe("red apple", top_k=1, guidance_scale=1.0, output_type="codes")
            assert torch.equal(found.result(600).codes, wanted.codes)


@pytest.mark.process
def test_a_plain_server_answers_the_client_and_refuses_guidance(python, pipeline, tmp_path):
    pipe, folder, _ = exported(pipeline, tmp_path)
    started = [
        python,
        "-m",
        "vllm.entrypoints.cli.main",
        "serve",
        str(folder),
        "--skip-tokenizer-init",
        "--enforce-eager",
    ]
    with serving(started) as url, RemotePipeline(folder, url) as there:
        found = there(PROMPTS, GenerationOptions(top_k=1, guidance_scale=1.0))
        assert torch.equal(found.codes, pipe(PROMPTS, top_k=1, guidance_scale=1.0, output_type="codes").codes)
        with closing(RemoteEngine(there)) as engine:
            assert not engine.guided
        with pytest.raises(ValueError, match=r"samples without guidance\. .*started by `python -m unified_vllm`"):
            there("red apple", GenerationOptions(guidance_scale=3.0))


def test_streams_of_a_prompt():
    """<bos> 5 6 <null> <boi> 52: the caption is hidden from one stream, the null token from the other."""
    ids, positions = torch.tensor([1, 5, 6, 70, 3, 52]), torch.arange(6)
    streams = two_streams(ids, positions, 70, 50, 3, 1)
    assert streams.ids.tolist() == [1, 5, 6, 0, 3, 52, 1, 5, 6, 1, 3, 52]
    assert streams.positions.tolist() == [0, 1, 2, 3, 3, 4, 0, 1, 2, 3, 4, 5]
    assert streams.hidden.int().tolist() == [0, 0, 0, 1, 0, 0, 1, 1, 1, 0, 0, 0]
    without = two_streams(ids, positions, 70, 50, 3, None)  # no <bos>: the unconditional prompt is <boi> alone
    assert without.hidden.int().tolist() == [0, 0, 0, 1, 0, 0, 1, 1, 1, 1, 0, 0]
    assert two_streams(ids[4:5], positions[:1], 70, 50, 3, 1).positions.tolist() == [0, 0]  # never below the table
    for token in range(6):  # alone, as a chunk or a decoding step, it is what it is among the others
        alone = two_streams(ids[token : token + 1], positions[token : token + 1], 70, 50, 3, 1)
        for name in ("ids", "positions", "hidden"):
            assert getattr(alone, name).tolist() == getattr(streams, name).view(2, -1)[:, token].tolist()


def test_command_of_a_guided_server(pipeline, tmp_path):
    _, folder, about = exported(pipeline, tmp_path)
    overrides = guided_overrides(folder)
    assert overrides["vocab_size"] == about["first_code"] + 2 * about["codebook_size"]
    assert overrides["unified"]["architecture"] == "LlamaForCausalLM"
    started = command([str(folder), "--port", "1"])
    assert json.loads(started[started.index("--hf-overrides") + 1]) == overrides and started[-2:] == ["--port", "1"]
    with pytest.raises(ValueError, match=r"is no folder of `unified export` .FileNotFoundError"):
        command([str(tmp_path)])
    with pytest.raises(ValueError, match=r"model: none given"):
        command(["--port", "1"])

"""The client of another engine's server: folders, addresses and what is asked."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hostile.case import VALID, cases
from hostile.world import World

from unified.pipeline.options import GenerationOptions
from unified.serving.remote import RemotePipeline
from unified.serving.remote_engine import RemoteEngine

NOWHERE = "http://127.0.0.1:9"


def opened(file: str = "unified.json", content: str | None = None, **changes: Any) -> Callable[[World], object]:
    """Open a copy of an export with a changed file."""

    def change(folder: Path) -> None:
        path = folder / file
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}) if content is None else content)

    return lambda w: RemotePipeline(w.copy(w.exported, change), NOWHERE)


def made(**options: Any) -> Callable[[World], object]:
    return lambda w: RemotePipeline(w.exported, **{"url": NOWHERE, **options})


def asked(prompt: Any = "red apple", **options: Any) -> Callable[[World], object]:
    return lambda w: RemotePipeline(w.exported, NOWHERE, retries=0)(prompt, GenerationOptions(**options))


def engine(**options: Any) -> Callable[[World], object]:
    return lambda w: RemoteEngine(RemotePipeline(w.exported, NOWHERE, retries=0), **options)


CASES = [
    *cases(
        "remote: folder",
        ("as it was exported", opened(), VALID),
        ("none", lambda w: RemotePipeline(w.root / "nothing", NOWHERE), "pipeline unified.json"),
        ("a pipeline", lambda w: RemotePipeline(w.pipeline_folder, NOWHERE), "pipeline unified.json"),
        ("a list", opened(content="[]"), "pipeline unified.json list"),
        ("no JSON", opened(content="{"), "pipeline unified.json"),
        ("a deep list", opened(content="[" * 10**5), "pipeline unified.json"),
        ("nothing in it", opened(content="{}"), "pipeline unified.json first_code"),
        ("a text as first code", opened(first_code="288"), "first_code 288"),
        ("a null as first code", opened(first_code=None), "first_code None"),
        ("a fraction as first code", opened(first_code=288.5), "first_code 288.5"),
        ("a negative size", opened(codebook_size=-20), "codebook_size -20"),
        ("a list as size", opened(codebook_size=[20]), "codebook_size 20"),
        ("another size", opened(codebook_size=21), "codebook_size 21"),
        ("grids of text", opened(image_grids="4x4"), "image_grids 4x4"),
        ("a grid of 0", opened(image_grids=[[0, 4]]), "image_grids 0"),
        ("a huge boi", opened(boi_token_id=10**9), "boi_token_id 1000000000"),
        ("another image tokenizer", opened(image_tokenizer_fingerprint="x"), "image_tokenizer fingerprint"),
        ("another text tokenizer", opened(text_tokenizer_fingerprint="x"), "text_tokenizer fingerprint"),
        ("a scale of nan", opened(guidance_scale=float("nan")), "guidance_scale nan"),
        ("a temperature of 0", opened(temperature=0), "temperature 0"),
        ("config.json a list", opened("config.json", "[]"), "config.json list"),
        ("config.json of no type", opened("config.json", '{"vocab_size": 308}'), "text_config model_type"),
        ("config.json without sizes", opened("config.json", "{}"), "config.json None"),
        ("config.json of an unknown type", opened("config.json", model_type="nothing"), "model_type nothing"),
    ),
    *cases(
        "remote: arguments",
        ("no address", made(url=""), "server"),
        ("a file", made(url="file:///etc/passwd"), "server file:///etc/passwd"),
        ("no scheme", made(url="localhost:8000"), "server localhost:8000"),
        ("a number", made(url=7), "server 7"),
        ("a null byte", made(url="http://a\0b"), "server"),
        ("a surrogate", made(url="http://\udcff"), "server"),
        ("no concurrency", made(concurrency=0), "concurrency 0"),
        ("half a request", made(concurrency=0.5), "concurrency 0.5"),
        ("no time", made(timeout=0), "timeout 0"),
        ("a time of nan", made(timeout=float("nan")), "timeout nan"),
        ("a time of text", made(timeout="1"), "timeout 1"),
        ("negative retries", made(retries=-1), "retries -1"),
        ("a key with a line break", made(api_key="a\nb"), "api_key"),
        ("a key beyond ASCII", made(api_key="\u00fc"), "api_key"),
        ("a number as key", made(api_key=7), "api_key"),
    ),
    *cases(
        "remote: requests",
        ("nobody there", asked(), "server 127.0.0.1:9"),
        ("an empty prompt", asked(" "), "prompt"),
        ("a number", asked(7), "prompt 7"),
        ("a long prompt", asked("red apple " * 99), "prompt tokens"),
        ("another size", asked(height=64), "height 64"),
        ("a schedule", asked(guidance_schedule="linear"), "guidance_schedule linear"),
        ("another decoding", asked(decoding="jacobi"), "decoding jacobi"),
    ),
    *cases(
        "remote: engine",
        ("nobody there", engine(), "server 127.0.0.1:9"),
        ("no place to wait", engine(waiting=0), "waiting 0"),
        ("half a place", engine(waiting=0.5), "waiting 0.5"),
    ),
]

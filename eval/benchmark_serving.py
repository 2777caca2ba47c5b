"""Serving side by side: the engine's running batch against one request at a time, for the same arrivals.

    python eval/benchmark_serving.py --json serving.json [--pipeline DIR] [--loads 0.5 2 6]
    python eval/benchmark_serving.py --pipeline DIR --server URL --export DIR [--concurrency 1 8 32]

Requests arrive at random (Poisson, seeded); a load of 2 means that two arrive in the time in which one is sampled alone.
Images are compared before any time is printed. Ratios are medians of paired rounds with their range, above 1 where
the engine is better; absolute times are not reported: they belong to the machine. The second form compares the engine with a
server of another one (see engines/unified_vllm) that has the pipeline's export, with so many requests under way.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor

from unified import UnifiedConfig, UnifiedForCausalLM, UnifiedPipeline
from unified.pipeline.options import GenerationOptions
from unified.serving.engine import Engine
from unified.serving.remote import RemotePipeline
from unified_tokenizers import VQConfig, VQModel, train_sentencepiece

CAPTIONS = ["red apple", "a green tree", "the small dog", "blue car", "a cat and a dog", "yellow sun over the sea"]
OPTIONS = GenerationOptions(guidance_scale=3.0)
Sample = Callable[[int], Tensor]  # number of a request to its codes


def random_pipeline(grid: int, width: int, layers: int, positions: str = "2d") -> UnifiedPipeline:
    """A pipeline with random weights: a Llama, small tokenizers."""
    torch.manual_seed(0)
    images = VQModel(VQConfig(channels=16, codebook_size=1024)).eval()
    with tempfile.TemporaryDirectory() as folder:
        texts = train_sentencepiece(CAPTIONS, folder, vocab_size=320)
    text = {
        "model_type": "llama", "vocab_size": texts.vocab_size, "hidden_size": width, "intermediate_size": width * 8 // 3,
        "num_hidden_layers": layers, "num_attention_heads": max(width // 64, 1), "pad_token_id": 0, "bos_token_id": 1,
        "eos_token_id": 2, "max_position_embeddings": grid * grid + 64,
    }  # fmt: skip
    config = UnifiedConfig(text_config=text, codebook_size=1024, boi_token_id=texts.boi_token_id,
                           eoi_token_id=texts.eoi_token_id, positions=positions, image_grids=[[grid, grid]])  # fmt: skip
    return UnifiedPipeline(UnifiedForCausalLM(config).eval(), images, texts)


def arrivals(count: int, load: float, service: float, seed: int) -> list[float]:
    """Seconds at which requests come: a Poisson process with ``load`` of them in ``service`` seconds on average."""
    gaps = np.random.default_rng(seed).exponential(service / load, count)
    return (gaps.cumsum() - gaps[0]).tolist()


def serve(sample: Sample, times: list[float], workers: int) -> list[float]:
    """Seconds at which requests are answered that come at ``times``; ``workers`` of them may be under way."""
    start = time.perf_counter()

    def answer(number: int) -> float:
        time.sleep(max(0.0, times[number] - (time.perf_counter() - start)))
        sample(number)
        return time.perf_counter() - start

    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(answer, range(len(times))))


def metrics(times: list[float], answered: list[float]) -> dict[str, float]:
    """Requests per second from the first arrival to the last answer, and quantiles of the time to an answer."""
    latency = np.subtract(answered, times)
    return {
        "throughput": len(times) / (max(answered) - times[0]),
        "p50": float(np.quantile(latency, 0.5)), "p95": float(np.quantile(latency, 0.95)),
    }  # fmt: skip


def better(alone: list[dict[str, float]], engine: list[dict[str, float]]) -> dict[str, Any]:
    """How many times better the engine is: median and range of the rounds' ratios."""
    result = {}
    for name in ("throughput", "p50", "p95"):
        pairs = [
            (e[name], a[name]) if name == "throughput" else (a[name], e[name])
            for a, e in zip(alone, engine, strict=True)
        ]
        ratios = [one / other for one, other in pairs]
        result[name] = {"ratio": round(median(ratios), 3), "spread": [round(min(ratios), 3), round(max(ratios), 3)]}
    return result


def measure(
    pipe: UnifiedPipeline, loads: list[float], requests: int, max_rows: int, rounds: int
) -> list[dict[str, Any]]:
    """Both ways at every load.

    Raises:
        RuntimeError: if the engine generates other images than the pipeline alone.
    """
    pipe.set_progress_bar_config(disable=True)

    def asked(number: int) -> dict[str, Any]:
        return {"prompt": CAPTIONS[number % len(CAPTIONS)], "generator": torch.Generator().manual_seed(number)}

    with closing(Engine(pipe, max_rows, waiting=max(requests, len(CAPTIONS)))) as engine:

        def together(number: int) -> Tensor:
            return engine.submit(options=OPTIONS, **asked(number)).result().codes

        def alone(number: int) -> Tensor:
            return pipe(guidance_scale=OPTIONS.guidance_scale, **asked(number)).codes

        with ThreadPoolExecutor(len(CAPTIONS)) as pool:
            sampled = list(pool.map(together, range(len(CAPTIONS))))
        seconds = []
        for number, codes in enumerate(sampled):
            start = time.perf_counter()
            if not torch.equal(alone(number), codes):
                raise RuntimeError(f"request {number}: the engine generates another image; not timing this.")
            seconds.append(time.perf_counter() - start)
        service, result = median(seconds), []
        for load in loads:
            ways: dict[str, list[dict[str, float]]] = {"alone": [], "engine": []}
            for seed in range(rounds):
                times = arrivals(requests, load, service, seed)
                ways["alone"].append(metrics(times, serve(alone, times, 1)))
                ways["engine"].append(metrics(times, serve(together, times, requests)))
            result.append({"load": load, **better(**ways)})
    return result


def measure_server(
    pipe: UnifiedPipeline, server: RemotePipeline, concurrency: list[int], requests: int, rounds: int, guidance: float
) -> list[dict[str, Any]]:
    """Images per second of a server, as a ratio to the engine's, with so many requests under way; pixels included.

    Raises:
        RuntimeError: if the likeliest codes differ.
    """
    pipe.set_progress_bar_config(disable=True)
    greedy, sampled = (GenerationOptions(guidance_scale=guidance, top_k=top_k) for top_k in (1, 0))
    if not torch.equal(server(CAPTIONS, greedy).codes, pipe(CAPTIONS, **greedy.to_mapping()).codes):
        raise RuntimeError("server: its greedy codes are not the pipeline's; not timing this.")
    captions, result = [CAPTIONS[number % len(CAPTIONS)] for number in range(requests)], []
    for count in concurrency:
        server.concurrency = count
        with closing(Engine(pipe, 2 * count if guidance > 1 else max(count, 2), waiting=requests)) as engine:

            def ours(number: int, engine: Engine = engine) -> Tensor:
                return engine.submit(captions[number], sampled, generator=number).result().codes

            ratios = []
            for number in range(rounds + 1):
                start = time.perf_counter()
                server(captions, sampled)
                middle = time.perf_counter()
                with ThreadPoolExecutor(count) as pool:
                    list(pool.map(ours, range(requests)))
                if number:  # the first one warms up
                    ratios.append((time.perf_counter() - middle) / (middle - start))
        spread = [round(min(ratios), 3), round(max(ratios), 3)]
        result.append({"concurrency": count, "ratio": round(median(ratios), 3), "spread": spread})
    return result


def main(argv: Sequence[str] | None = None) -> None:
    """Check, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="file to write")
    parser.add_argument("--pipeline", help="trained pipeline (default: a small one with random weights)")
    parser.add_argument("--loads", type=float, nargs="+", default=[0.5, 2.0, 6.0], help="default: %(default)s")
    parser.add_argument("--requests", type=int, default=16, help="in every round (default: %(default)s)")
    parser.add_argument("--max-rows", type=int, default=16, help="rows of the engine's batch (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds, each with its arrivals (default: %(default)s)")
    parser.add_argument("--grid", type=int, default=8, help="side of the code grid (default: %(default)s)")
    parser.add_argument("--width", type=int, default=256, help="of the random model (default: %(default)s)")
    parser.add_argument("--layers", type=int, default=4, help="of the random model (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="torch threads (default: %(default)s)")
    parser.add_argument(
        "--server", metavar="URL", help="compare the engine with this server; needs --pipeline and --export"
    )
    parser.add_argument("--export", type=Path, help="folder of `unified export` that the server has")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8, 32], help="default: %(default)s")
    parser.add_argument("--guidance", type=float, default=3.0, help="with --server (default: %(default)s)")
    args = parser.parse_args(argv)
    if args.server and not (args.pipeline and args.export):
        parser.error("--server needs --pipeline, and --export with the folder that the server has")
    torch.set_num_threads(args.threads)
    pipe = (
        UnifiedPipeline.from_pretrained(args.pipeline)
        if args.pipeline
        else random_pipeline(args.grid, args.width, args.layers)
    )
    if args.server:
        with RemotePipeline(args.export, args.server, max(args.concurrency)) as server:
            found = measure_server(pipe, server, args.concurrency, args.requests, args.rounds, args.guidance)
        for row in found:
            print(f"{row['concurrency']} under way: {row['ratio']:.2f} times the engine's throughput, {row['spread']}")
        if args.json:
            args.json.write_text(json.dumps(found, indent=2) + "\n")
        return
    loads = measure(pipe, args.loads, args.requests, args.max_rows, args.rounds)
    for row in loads:
        print(
            f"load {row['load']:g}:",
            ", ".join(f"{name} {row[name]['ratio']:.2f}" for name in ("throughput", "p50", "p95")),
        )
    conditions = {
        "torch": torch.__version__, "threads": args.threads, "requests": args.requests, "max_rows": args.max_rows,
        "rounds": args.rounds, "guidance": OPTIONS.guidance_scale, "dtype": "float32",
        "model": args.pipeline or f"Llama, width {args.width}, {args.layers} layers, random weights",
        "codes": "x".join(str(side // pipe.image_tokenizer.downsample) for side in pipe.default_size), "vq_decoding": "included",
        "ratios": "engine against one request at a time, same arrivals; above 1 where the engine is better",
    }  # fmt: skip
    if args.json:
        args.json.write_text(json.dumps({"conditions": conditions, "loads": loads}, indent=2) + "\n")


if __name__ == "__main__":
    main()

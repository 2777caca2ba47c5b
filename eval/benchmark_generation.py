"""Generation speed side by side: ours against transformers' `generate()` with guidance, and against LlamaGen's.

    python eval/benchmark_generation.py --json generation.json [--llamagen DIR] [--pipeline DIR] [--images FILE] [--sweep]

One process, shared weights, interleaved rounds, warm-up dropped; ratios are medians of paired rounds with their range.
Codes are compared with the peers' before any time is printed. Speculative decoding needs a trained model: `--pipeline`
measures it there, and `--images` shows what its modes sample. Absolute times are not reported: they belong to the machine.
"""

import argparse
import json
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmark_peers import llamagen_generate, load_llamagen, transformers_generate
from benchmark_training import SPECIAL, our_model, plain_llama
from unified import UnifiedPipeline
from unified.data.batches import make_batch
from unified.decoding import Prompt, Sampling, generate_codes, generate_conditioned, make_decoder
from unified.decoding.batch_rows import Request
from unified.decoding.continuous_batching import Batcher
from unified.decoding.decode import cell_logits, span_coordinates
from unified.decoding.prefill import causal_bias, prefill
from unified.decoding.sampling import PositionNoise, filter_logits, guide, sample_gumbel
from unified.decoding.speculative import MODES, speculate_codes
from unified.lora.adapters import attach_lora
from unified.lora.base import base_of
from unified.pipeline.arguments import image_prompt
from unified.sequence import ImageSegment, TokenSequence
from unified_eval.sheets import captioned_grid
from unified_eval.timing import compared, interleaved
from unified_tokenizers import VQGAN, VQGANConfig

# N1: anti-diagonals against LlamaGen, and against our own raster order for one image and for 16 together. N3: with an adapter that
# needs no guidance against the model with guidance, which takes two rows for each image; for one image, and for 16 together.
GOALS = {"G1": 1.4, "G1_llamagen": 1.5, "G2": 1.9, "G3": 2.5, "G4": 1.3, "G5": 5.0, "G6": 6.0,
         "N1_llamagen": 8.0, "N1": 3.0, "N1_batch16": 3.0, "N3": 1.9, "N3_batch16": 1.9}  # fmt: skip
ORDERS: dict[str, dict[str, Any]] = {
    "diagonals": {"order": "diagonals"}, "rows": {"order": "rows"}, "spread": {"order": "spread"},
    "channel": {"merge": "channel"}, "channel diagonals": {"order": "diagonals", "merge": "channel"},
}  # fmt: skip
SAMPLING = Sampling(guidance_scale=3.0, top_k=2000)
GREEDY = Sampling(guidance_scale=3.0, top_k=1)
UNGUIDED = Sampling(top_k=2000)
# What G4 and G6 measure, chosen beforehand; other modes and windows are listed.
EXACT, PARALLEL = "sjd 16", "gsd 16 int8"
START, NOTHING = [1, 0, 0, 2], [1, 2]  # <bos>, two words and <boi>; the unconditional side


def seeds(count: int) -> list[torch.Generator]:
    """Generators 0, 1, 2, ..."""
    return [torch.Generator().manual_seed(i) for i in range(count)]


def ours(decoder: Any, grid: int, batch: int = 1, sampling: Sampling = SAMPLING) -> Callable[[], Tensor]:
    """Sample ``batch`` images after a short prompt."""
    return lambda: generate_codes(decoder, [START] * batch, [NOTHING] * batch, (grid, grid), sampling, seeds(batch))


def ours_as_llamagen(decoder: Any, grid: int, sampling: Sampling = SAMPLING, batch: int = 1) -> Callable[[], Tensor]:
    """Ours samples class 7 with LlamaGen's weights."""
    classes = torch.full((batch,), 7)
    return lambda: generate_conditioned(decoder, classes, (grid, grid), sampling, seeds(batch))


def check_equal(name: str, one: Tensor, other: Tensor) -> None:
    """Raise RuntimeError unless codes agree."""
    if not torch.equal(one, other):
        raise RuntimeError(f"{name}: {int((one != other).sum())} of {one.numel()} codes differ; not timing this.")


def check_against_full_forward(model: Any, codes: Tensor, sampling: Sampling) -> None:
    """Raise RuntimeError unless ``codes (1, h, w)`` of seed 0 are those of a loop without cache under the same noise.

    Such a loop sees the codes before each place and nothing else, so one forward pass over the image replays it.
    """
    grid = (codes.shape[1], codes.shape[2])
    vocabulary = model.config.vocabulary
    sides = []
    with torch.inference_mode():
        for ids in (START, NOTHING):
            row = torch.tensor([*ids, *(vocabulary.text_vocab_size + codes).flatten().tolist()])
            inputs = make_batch([TokenSequence(row, row, [grid])], model.config).inputs
            del inputs["labels"]
            sides.append(model(**inputs).image_logits[0, len(ids) - 1 : -1])
    scales = torch.tensor(sampling.scales(codes.numel()))[:, None]
    noise = PositionNoise(seeds(1), vocabulary.codebook_size, codes.device).at(0, codes.numel())[0]
    expected = sample_gumbel(filter_logits(guide(sides[0], sides[1], scales), sampling), noise)
    check_equal("a loop without cache", expected, codes.flatten())


@torch.inference_mode()
def guided_logits_along(decoder: Any, rows: list[Any], codes: Tensor, sampling: Sampling) -> Tensor:
    """Guided logits ``(h*w, K)`` that a decoder gives along an image ``(1, h, w)``; rows are a prompt and its opposite."""
    count = codes.numel()
    state = prefill(decoder, [row if isinstance(row, Prompt) else Prompt(tuple(row)) for row in rows], count)
    places = decoder.positions(span_coordinates(decoder.model, state.position, (codes.shape[1], codes.shape[2])))
    embeds = decoder.embed(codes.reshape(1, -1)[:, :-1]).expand(2, -1, -1)
    all_codes = torch.ones(1, 1, dtype=torch.bool, device=embeds.device)
    rest = decoder(embeds, places[:, :-1], state.cache, causal_bias(state, count - 1), all_codes)
    hidden = torch.cat([state.hidden[:, None], rest], dim=1)
    return cell_logits(decoder, hidden[:, :, None], None, sampling, torch.tensor(sampling.scales(count))[:, None])[0]


def int8_quality(model: Any, rows: list[Any], grid: tuple[int, int], sampling: Sampling) -> dict[str, float]:
    """How far 8-bit weights move the distributions of the codes along one exact image."""
    exact, rounded = make_decoder(model), make_decoder(model, int8=True)
    codes = generate_codes(exact, rows[:1], rows[1:], grid, sampling, seeds(1))
    one, other = (guided_logits_along(d, rows, codes, sampling).log_softmax(-1) for d in (exact, rounded))
    return {
        "kl_nats_per_code": round(float(F.kl_div(other, one, log_target=True, reduction="batchmean")), 5),
        "same_most_likely_code": round(float((one.argmax(-1) == other.argmax(-1)).float().mean()), 4),
    }


def compiled(steps: dict[str, Callable[[], Tensor]]) -> dict[str, float]:
    """First calls of steps that compile, in seconds; the only absolute times, one to a line."""
    seconds = {}
    for name, step in steps.items():
        begin = time.perf_counter()
        step()
        seconds[name] = round(time.perf_counter() - begin, 1)
    return seconds


def measure(rounds: int, llamagen: str | None, grid: int, codebook: int, compile: bool) -> dict[str, Any]:
    """Goals that hold for any weights: G1, G2, G3, G5; ratios above 1 when ours is faster."""
    model = our_model(codebook, grid=grid).eval()
    model.config.positions = "1d"  # those of the plain transformers model
    eager, int8 = make_decoder(model), make_decoder(model, int8=True)
    for sampling in (SAMPLING, Sampling(guidance_scale=3.0), GREEDY):
        check_against_full_forward(model, ours(eager, grid, sampling=sampling)(), sampling)
    llama = plain_llama(model).eval()
    theirs = partial(transformers_generate, llama, SPECIAL, START, NOTHING, grid)
    check_equal("transformers", theirs(GREEDY)(), ours(eager, grid, sampling=GREEDY)())
    steps = {"hf": theirs(SAMPLING), "eager": ours(eager, grid), "int8": ours(int8, grid)}
    for batch in (4, 16):
        steps |= {f"batch{batch}": ours(eager, grid, batch), f"hf{batch}": theirs(SAMPLING, batch)}
        check_equal(f"transformers, batch {batch}", theirs(GREEDY, batch)(), ours(eager, grid, batch, GREEDY)())
        check_equal(f"batch {batch} and the first of it alone", steps["eager"](), steps[f"batch{batch}"]()[:1])
    compilation: dict[str, float] = {}
    if llamagen:
        generate, peer, twin = load_llamagen(llamagen, 384, 6, 6, codebook, grid)
        llamagen_codes = llamagen_generate(generate, peer, grid, GREEDY)()
        twins = {"G1_llamagen": make_decoder(twin), "G3": make_decoder(twin, int8=True)}
        if compile:
            twins["G2"] = make_decoder(twin, compile=True)
            fast_peer = torch.compile(peer)
            pair = {
                "ours": ours_as_llamagen(twins["G2"], grid, GREEDY),
                "LlamaGen": llamagen_generate(generate, fast_peer, grid, GREEDY),
            }
            compilation = compiled(pair)
            check_equal("LlamaGen, compiled", llamagen_codes, pair["LlamaGen"]())
            steps["llamagen compiled"] = llamagen_generate(generate, fast_peer, grid, SAMPLING)
        for name, decoder in twins.items():
            if name != "G3":
                check_equal(f"{name}, LlamaGen", llamagen_codes, ours_as_llamagen(decoder, grid, GREEDY)())
            steps[name] = ours_as_llamagen(decoder, grid)
        steps["llamagen"] = llamagen_generate(generate, peer, grid, SAMPLING)
        for batch in (4, 16):
            steps[f"llamagen{batch}"] = llamagen_generate(generate, peer, grid, SAMPLING, batch)
            steps[f"twin{batch}"] = ours_as_llamagen(twins["G1_llamagen"], grid, batch=batch)
            greedy = ours_as_llamagen(twins["G1_llamagen"], grid, GREEDY, batch)()
            check_equal(f"LlamaGen, batch {batch}", llamagen_generate(generate, peer, grid, GREEDY, batch)(), greedy)
    for order, prediction in ORDERS.items():
        decoder = make_decoder(our_model(codebook, grid=grid, prediction=prediction).eval())
        steps |= {order: ours(decoder, grid), f"{order}16": ours(decoder, grid, 16)}
        check_equal(f"{order}, batch 16 and the first of it alone", steps[order](), steps[f"{order}16"]()[:1])
    adapted = make_decoder(cast(Any, attach_lora(our_model(codebook, grid=grid).eval())))
    steps |= {f"adapter{batch}": ours(adapted, grid, batch, UNGUIDED) for batch in (1, 16)}
    check_equal("adapter, batch 16 and the first of it alone", steps["adapter1"](), steps["adapter16"]()[:1])
    steps["queue"], steps["queue_one_by_one"] = serving(eager, grid)
    check_equal("requests in a batch and one by one", steps["queue"](), steps["queue_one_by_one"]())
    timings = interleaved(steps, rounds)
    goals = {"G1": compared(timings, "hf", "eager")}
    others = {
        "int8 against transformers": compared(timings, "hf", "int8"),
        "batch 4 against batch 1, images/s": compared(timings, "eager", "batch4", scale=4),
        "8 requests in a batch of 8 against one by one": compared(timings, "queue_one_by_one", "queue"),
        "decoding the codes to 256 px (VQ-16) in units of sampling them": vq_share(timings, rounds),
    }
    for order in ORDERS:
        others[f"{order} against raster order, one image"] = compared(timings, "eager", order)
        others[f"{order} against raster order, 16 images"] = compared(timings, "batch16", f"{order}16")
    goals |= {"N1": compared(timings, "eager", "diagonals"), "N1_batch16": compared(timings, "batch16", "diagonals16")}
    goals |= {"N3": compared(timings, "eager", "adapter1"), "N3_batch16": compared(timings, "batch16", "adapter16")}
    others |= {f"batch {n} against transformers": compared(timings, f"hf{n}", f"batch{n}") for n in (4, 16)}
    if llamagen:
        goals |= {name: compared(timings, "llamagen", name) for name in sorted(twins)}
        goals["N1_llamagen"] = compared(timings, "llamagen", "diagonals")
        goals["G3"]["quality with random weights"] = int8_quality(model, [START, NOTHING], (grid, grid), SAMPLING)
        others |= {f"batch {n} against LlamaGen": compared(timings, f"llamagen{n}", f"twin{n}") for n in (4, 16)}
        if compile:
            others["compiled against LlamaGen compiled"] = compared(timings, "llamagen compiled", "G2")
    goals["G5"] = compared(timings, "eager", "batch16", scale=16)
    return {"goals": goals, "others": others, "seconds to compile": compilation}


def serving(decoder: Any, grid: int, count: int = 8) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
    """Requests with different prompts: in one running batch, which each joins a step after the last, or one by one.

    Both return the codes ``(count, grid, grid)``.
    """

    def prompt(i: int) -> list[int]:
        return [1, *[0] * i, 2]

    def together() -> Tensor:
        batcher, nothing = Batcher(decoder, 2 * count, grid * grid + count + 4), Prompt(tuple(NOTHING))
        requests = [
            Request(Prompt(tuple(prompt(i))), (grid, grid), seed, SAMPLING, negative=nothing)
            for i, seed in enumerate(seeds(count))
        ]
        done = []
        for request in requests:
            batcher.submit(request)
            done += batcher.step()
        while batcher.busy:
            done += batcher.step()
        found = {request: image.codes for request, (image,) in done if isinstance(image, ImageSegment)}
        return torch.stack([found[request] for request in requests])

    def in_turn() -> Tensor:
        options = ((grid, grid), SAMPLING)
        each = [generate_codes(decoder, [prompt(i)], [NOTHING], *options, [s]) for i, s in enumerate(seeds(count))]
        return torch.cat(each)

    return together, in_turn


def vq_share(timings: Any, rounds: int) -> dict[str, Any]:
    """Time of a VQ-16 decoder for one 256 px image over that of sampling its codes."""
    tokenizer, codes = VQGAN(VQGANConfig()).eval(), torch.zeros(1, 16, 16, dtype=torch.int64)
    decode = interleaved({"vq": lambda: tokenizer.decode(codes)}, min(rounds, 3))["vq"]
    ratio = median(wall for wall, _ in decode) / median(wall for wall, _ in timings["eager"])
    return {"ratio": round(ratio, 3)}


def measure_trained(folder: str, rounds: int, llamagen: str | None, sheet: Path | None) -> dict[str, Any]:
    """Goals that need a trained model: G4 and, against LlamaGen at its size, G6."""
    pipe = UnifiedPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    model = base_of(pipe.model)
    config = model.config
    height, width = (side // pipe.image_tokenizer.downsample for side in pipe.default_size)
    sampling, captions = Sampling(1.5, 0.85), ["red apple", "penguin", "house", "airplane"]
    size = (height, width)
    rows = [image_prompt(caption, pipe.text_tokenizer, config, size) for caption in captions]
    nothing = [image_prompt("", pipe.text_tokenizer, config, size)] * len(rows)
    decoders = {"": make_decoder(model), " int8": make_decoder(model, int8=True)}

    def one_by_one() -> list[Tensor]:
        return [
            generate_codes(decoders[""], rows[i : i + 1], nothing[:1], size, sampling, seeds(len(rows))[i : i + 1])
            for i in range(len(rows))
        ]

    def passes(mode: str, window: int, kind: str) -> list[Tensor]:
        iterator = speculate_codes(
            decoders[kind], rows, nothing, size, sampling, seeds(len(rows)), mode=mode, window=window
        )
        return [codes.clone() for codes in iterator]

    check_equal("jacobi", passes("jacobi", 8, "")[-1].reshape(-1, *size), torch.cat(one_by_one()))
    tried = [(mode, window, "") for mode in MODES for window in (8, 16)] + [("gsd", 8, " int8"), ("gsd", 16, " int8")]
    modes: dict[str, dict[str, Any]] = {}
    steps: dict[str, Callable[[], Any]] = {"plain": one_by_one}
    for mode, window, kind in tried:
        name = f"{mode} {window}{kind}"
        steps[name] = partial(passes, mode, window, kind)
        modes[name] = {"codes_per_pass": round(len(rows) * height * width / len(passes(mode, window, kind)), 2)}
    if llamagen:
        text = config.text_config
        generate, peer, _ = load_llamagen(
            llamagen, text.hidden_size, text.num_hidden_layers, text.num_attention_heads, config.codebook_size, height
        )
        theirs = llamagen_generate(generate, peer, height, sampling)
        steps["llamagen"] = lambda: [theirs() for _ in rows]
    timings = interleaved(steps, rounds)
    for name, metrics in modes.items():
        metrics |= compared(timings, "plain", name)
    goals = {"G4": {**modes[EXACT], "mode and window": EXACT}}
    if llamagen:
        goals["G6"] = {**compared(timings, "llamagen", PARALLEL), "mode and window": PARALLEL}
    if sheet:
        save_modes(pipe, captions, sheet)
    quality = int8_quality(model, [rows[0], nothing[0]], size, sampling)
    return {"goals": goals, "modes against plain": modes, "prompts": captions, "int8 quality": quality}


def save_modes(pipe: UnifiedPipeline, captions: list[str], path: Path) -> None:
    """A sheet with one row of images for each decoding mode, and one with 8-bit weights."""

    def sample(mode: str) -> Any:
        return pipe(
            captions, generator=seeds(len(captions)), decoding=mode, guidance_scale=1.5, temperature=0.85
        ).images

    rows = [sample(mode) for mode in ("plain", *MODES)]
    pipe.enable_fast_decoding(int8=True)
    rows += [sample("plain"), sample("gsd")]
    names = ["plain", *MODES, "plain, int8", "gsd, int8"]
    captioned_grid(rows, column_titles=captions, row_titles=names).save(path)


def sweep(rounds: int, grids: Sequence[int] = (8, 16, 32, 64)) -> list[dict[str, Any]]:
    """Time per code over the side of the grid, one image; the first row is 1."""
    rows = []
    for grid in grids:
        sample = ours(make_decoder(our_model(1024, width=256, layers=4, grid=grid).eval()), grid)
        seconds = median(wall for wall, _ in interleaved({"ours": sample}, rounds)["ours"]) / grid**2
        rows.append({"grid": grid, "time_per_code": seconds})
    return [{**row, "time_per_code": round(row["time_per_code"] / rows[0]["time_per_code"], 3)} for row in rows]


def main(argv: Sequence[str] | None = None) -> None:
    """Check, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="file to write")
    parser.add_argument("--llamagen", help="checkout of FoundationVision/LlamaGen to compare with")
    parser.add_argument("--pipeline", help="trained pipeline, for speculative decoding")
    parser.add_argument("--images", type=Path, help="with --pipeline: sheet of what the decoding modes sample")
    parser.add_argument("--rounds", type=int, default=5, help="measured rounds (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="torch threads (default: %(default)s)")
    parser.add_argument("--grid", type=int, default=16, help="side of the code grid (default: %(default)s)")
    parser.add_argument("--codebook", type=int, default=16384, help="number of codes (default: %(default)s)")
    parser.add_argument("--no-compile", action="store_true", help="leave out G2, whose compilation takes minutes")
    parser.add_argument("--sweep", action="store_true", help="also time per code over grids of 8 to 64")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    result: dict[str, Any] = {
        "conditions": {
            "torch": torch.__version__, "threads": args.threads, "rounds": args.rounds, "dtype": "float32",
            "model": "Llama, width 384, 6 layers, 6 heads, MLP 1024", "codebook": args.codebook,
            "codes": f"{args.grid}x{args.grid}", "prompt": "4 ids; against LlamaGen a class", "guidance": SAMPLING.guidance_scale,
            "top_k": SAMPLING.top_k, "batch": "1 unless named", "vq_decoding": "not included",
            "transformers": "generate() with guidance_scale, its own cache; one joint table of the same codes",
            "ratios": "wall time, median of paired rounds, spread = min and max, CPU time under cpu; both eager unless named",
            "weights": "random, but for G4, G6 and quality, which need --pipeline",
        },
        **measure(args.rounds, args.llamagen, args.grid, args.codebook, not args.no_compile),
    }  # fmt: skip
    if args.pipeline:
        trained = measure_trained(args.pipeline, args.rounds, args.llamagen, args.images)
        result["goals"] |= trained.pop("goals")
        result["trained"] = trained
        if "G3" in result["goals"]:
            result["goals"]["G3"]["quality"] = trained["int8 quality"]
    for name, metrics in result["goals"].items():
        metrics["goal"] = GOALS[name]
        low, high = metrics["spread"]
        print(
            f"{name:<12} {metrics['ratio']:>7.2f}  ({low} to {high}), CPU {metrics['cpu']['ratio']:.2f}, goal {GOALS[name]}"
        )
    for name, metrics in (result["others"] | result.get("trained", {}).get("modes against plain", {})).items():
        print(f"{name:<62} {metrics}")
    for name, seconds in result["seconds to compile"].items():
        print(f"seconds to compile, {name:<42} {seconds}")
    if args.sweep:
        result["sweep"] = sweep(max(3, args.rounds // 2))
        print("time per code:", {row["grid"]: row["time_per_code"] for row in result["sweep"]})
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()

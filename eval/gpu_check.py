"""What no CPU can prove, measured on one CUDA device and written as a page of markdown.

    make gpu-check
    python eval/gpu_check.py [--output runs/gpu_check.md] [--rounds 10]

Losses in bfloat16 beside those in float32, compiled steps beside plain ones, FlexAttention and FlashAttention beside masked
attention, images of CUDA generators, memory and speed of a full fine-tune of 1.2 B parameters. Weights are random, and nothing
is downloaded. A check that does not hold, or fails, ends the program with exit code 1.
"""

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate.utils import send_to_device
from torch import Tensor

from benchmark_training import batch_of, our_model, sequences_of
from unified.decoding import Sampling, generate_codes
from unified.prediction.arrange import Batch
from unified.training.throughput import batch_flops, peak_of
from unified_eval.timing import interleaved, paired_ratio

ONE_BILLION = {"codebook": 16384, "text_vocab": 32000, "width": 2048, "layers": 24}


class Row(NamedTuple):
    """A line of the page; ``passed`` is None for what is measured without a bound."""

    check: str
    measured: str
    expected: str
    passed: bool | None


def build(device: str, seed: int = 0, **sizes: Any) -> Any:
    """A model with random weights, in training mode."""
    torch.manual_seed(seed)
    return our_model(**{"codebook": 1024, "text_vocab": 512, **sizes}).to(device)


def loss_of(model: Any, batch: Batch, device: str, mixed: bool = False) -> Tensor:
    """The loss of a batch, in bfloat16 under autocast if ``mixed``."""
    with torch.autocast(device, torch.bfloat16, enabled=mixed):
        loss: Tensor = model(**send_to_device(batch.inputs, device)).loss
    return loss


def gradient(model: Any, loss: Tensor) -> Tensor:
    """All gradients as one vector."""
    model.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten().float() for p in model.parameters() if p.grad is not None])


def difference(ours: Tensor, theirs: Tensor) -> float:
    """Norm of the difference, relative to the second."""
    return float((ours - theirs).norm() / theirs.norm())


def check_precision(device: str, steps: int = 100, **sizes: Any) -> list[Row]:
    """A short training in bfloat16 and in float32 on one batch: the losses at the end."""
    losses = []
    for mixed in (True, False):
        model = build(device, **sizes)
        batch = batch_of(model, sequences_of(model, 4, 16, 8))
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, fused=True)
        for _ in range(steps):
            loss = loss_of(model, batch, device, mixed)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        losses.append(float(loss.detach()))
    ours, theirs = losses
    measured = f"{ours:.4f} beside {theirs:.4f}"
    return [
        Row(f"loss after {steps} steps, bf16 beside float32", measured, "within 2 %", abs(ours / theirs - 1) < 0.02)
    ]


def check_compiled(device: str, rounds: int, backend: str = "inductor", **sizes: Any) -> list[Row]:
    """The compiled model beside the plain one, at p = 1 and p = 2."""
    rows = []
    model = build(device, **sizes)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    for p in (1, 2):
        batch = batch_of(model, sequences_of(model, 4, 16, 8), p)
        theirs = gradient(model, loss_of(model, batch, device))
        off = difference(gradient(model, loss_of(compiled, batch, device)), theirs)
        rows.append(Row(f"gradients of the compiled model, p = {p}", f"off by {off:.1e}", "below 1e-3", off < 1e-3))
    batch = batch_of(model, sequences_of(model, 4, 16, 8))
    steps = {
        name: timed(device, lambda each=each: gradient(model, loss_of(each, batch, device, mixed=True)))  # type: ignore[misc]
        for name, each in (("plain", model), ("compiled", compiled))
    }
    ratio = paired_ratio(interleaved(steps, rounds, warmup=2), "plain", "compiled")
    return [*rows, Row("compiled steps in bf16, times as fast", str(ratio["ratio"]), f"range {ratio['spread']}", None)]


def timed(device: str, function: Callable[[], object]) -> Callable[[], None]:
    """The function, and the wait for the device."""

    def run() -> None:
        function()
        if device == "cuda":
            torch.cuda.synchronize()

    return run


def check_attention(device: str, kinds: Sequence[str] | None = None, **sizes: Any) -> list[Row]:
    """Other kinds of attention beside SDPA with a mask: gradients in packed rows and orders, in bfloat16."""
    if kinds is None:
        kinds = ["flex_attention", *(["flash_attention_2"] if find_spec("flash_attn") else [])]
    rows = []
    for kind in kinds:
        for order in ("raster", "diagonals", "spread"):
            if order != "raster" and kind.startswith("flash"):
                continue  # it takes no mask
            model = build(device, prediction={"order": order}, **sizes)
            sequences = sequences_of(model, 3, 16, 8)
            batch = batch_of(model, sequences, length=3 * 300)  # one row of three documents
            theirs = gradient(model, loss_of(model, batch, device, mixed=True))
            model.set_attn_implementation(kind)
            off = difference(gradient(model, loss_of(model, batch, device, mixed=True)), theirs)
            rows.append(Row(f"gradients with {kind}, {order}", f"off by {off:.1e}", "below 3e-2", off < 3e-2))
    return rows


def check_generators(device: str, grid: int = 8, **sizes: Any) -> list[Row]:
    """Images of the device's own generators: the same again, alone and in a batch."""
    model = build(device, **sizes).eval()
    prompts, sampling = [[1, 5, 2], [1, 6, 7, 2]], Sampling(guidance_scale=2.0)

    def sample(numbers: Sequence[int]) -> Tensor:
        generators = [torch.Generator(device).manual_seed(number) for number in numbers]
        asked = [prompts[number] for number in numbers]
        return generate_codes(model, asked, [[1, 2]] * len(asked), (grid, grid), sampling, generators)

    both, again, alone = sample([0, 1]), sample([0, 1]), sample([1])
    same = float((both[1] == alone[0]).float().mean())
    return [
        Row(
            "an image again, from the same generators", str(torch.equal(both, again)), "True", torch.equal(both, again)
        ),
        Row("codes of an image alone and in a batch", f"{same:.1%} equal", "100 % but for rounding", None),
    ]


def check_fine_tune(device: str, rounds: int, sizes: dict[str, Any] | None = None) -> list[Row]:
    """Memory and speed of whole training steps in bfloat16 with float32 weights and AdamW, activations recomputed."""
    total = torch.cuda.get_device_properties(0).total_memory if device == "cuda" else 0
    model = build(device, **(sizes or ONE_BILLION))
    count = sum(p.numel() for p in model.parameters())
    name = f"full fine-tune of {count / 1e9:.1f} B"
    if device == "cuda" and total < 1.3 * 16 * count:
        return [Row(name, f"the device has {total / 1e9:.0f} GB", f"{16 * count / 1e9:.0f} GB and activations", None)]
    model.activation_checkpointing_enable()
    batch = batch_of(model, sequences_of(model, 8, 16, 8))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def step() -> None:
        loss_of(model, batch, device, mixed=True).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    seconds = sorted(wall for wall, _ in interleaved({"step": timed(device, step)}, rounds, warmup=2)["step"])
    middle, rows = seconds[len(seconds) // 2], []
    if device == "cuda":
        peak = torch.cuda.max_memory_allocated()
        expected, fits = f"16 bytes a parameter are {16 * count / 1e9:.1f} GB", peak < 1.3 * 16 * count
        rows.append(Row(f"memory of a {name}", f"{peak / 1e9:.1f} GB", f"{expected}; below 1.3 times", fits))
        known = peak_of(torch.cuda.get_device_name())
        mfu = "peak not known" if known is None else f"{batch_flops(model.config, batch) / middle / known:.1%}"
        rows.append(Row(f"MFU of a {name}", mfu, "with recomputed activations", None))
    return [*rows, Row(f"tokens a second of a {name}", f"{batch.counts.positions / middle:.0f}", "", None)]


def page(title: str, rows: Sequence[Row]) -> str:
    """The rows as a table of markdown."""
    verdict = {True: "holds", False: "**does not hold**", None: "measured"}
    lines = [f"| {r.check} | {r.measured} | {r.expected} | {verdict[r.passed]} |" for r in rows]
    return "\n".join([f"# {title}", "", "| Check | Measured | Expected | |", "|---|---|---|---|", *lines, ""])


def run(checks: Mapping[str, Callable[[], list[Row]]]) -> list[Row]:
    """The rows of all checks; one that fails has its own row, and the others go on."""
    rows: list[Row] = []
    for name, check in checks.items():
        try:
            rows += check()
        except Exception as error:
            first = str(error).strip().splitlines() or [""]
            rows.append(Row(name, f"{type(error).__name__}: {first[0]}", "", False))
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Run all checks; returns the exit code."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("runs/gpu_check.md"), help="the page")
    parser.add_argument("--rounds", type=int, default=10, help="timed rounds")
    options = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("gpu-check: no CUDA device here, so nothing was checked", file=sys.stderr)
        return 1
    rows = run(
        {
            "precision": lambda: check_precision("cuda"),
            "compiler": lambda: check_compiled("cuda", options.rounds),
            "attention": lambda: check_attention("cuda"),
            "generators": lambda: check_generators("cuda"),
            "fine-tune": lambda: check_fine_tune("cuda", options.rounds),
        }
    )
    title = f"{torch.cuda.get_device_name()}, torch {torch.__version__}, CUDA {torch.version.cuda}"
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(page(title, rows), encoding="utf-8")
    print(page(title, rows))
    return int(any(row.passed is False for row in rows))


if __name__ == "__main__":
    sys.exit(main())

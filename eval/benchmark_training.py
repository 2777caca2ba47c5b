"""Training speed side by side: ours against transformers' Llama, and against checkouts of LlamaGen and of the NPP code.

    python eval/benchmark_training.py --json training.json [--llamagen DIR] [--npp DIR] [--packing] [--sweep]

One process, shared weights and data, interleaved rounds, warm-up dropped; ratios are medians of paired rounds with
their range. Losses are compared with references before any time is printed. Absolute times are not reported: they
belong to the machine. `--packing` adds packed against padded rows, `--sweep` cost over grid, vocabulary and patch size.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from benchmark_peers import load_peer
from unified import UnifiedConfig, UnifiedForCausalLM
from unified.data.batches import make_batch
from unified.prediction.arrange import Batch
from unified.prediction.merge import merged_grid, patches
from unified.prediction.schedule import training_flops
from unified.sequence import ImageSegment, TextSegment, TokenSequence, build_sequence
from unified_eval.timing import compared, interleaved
from unified_tokenizers import VQGAN, VQGANConfig

# T1 and T4 are against transformers; T4 at p = 1, T4_p2 at p = 2. N2: windows of 2 x 2 by the learned merge against p = 1.
GOALS = {"T1": 1.1, "T1_llamagen": 1.2, "T2": 1.25, "T3": 3.6, "T4": 1.6, "T4_p2": 3.5, "T5": 1 / 0.64, "T6": 5.0,
         "N2": 2.2}  # fmt: skip
SPECIAL = 4  # pad, bos, boi, eoi
Sequences = list[TokenSequence]


def our_model(
    codebook: int,
    text_vocab: int = SPECIAL,
    width: int = 384,
    layers: int = 6,
    grid: int = 16,
    prediction: dict[str, Any] | None = None,
) -> Any:
    """A Llama of 64-wide heads around which ours is built, in training mode."""
    torch.manual_seed(0)
    text = {
        "model_type": "llama", "vocab_size": text_vocab, "hidden_size": width, "intermediate_size": width * 8 // 3,
        "num_hidden_layers": layers, "num_attention_heads": width // 64, "pad_token_id": 0, "bos_token_id": 1,
        "eos_token_id": None, "max_position_embeddings": grid * grid + 64,
    }  # fmt: skip
    config = UnifiedConfig(
        text_config=text, codebook_size=codebook, boi_token_id=2, eoi_token_id=3, positions="2d", prediction=prediction
    )
    return UnifiedForCausalLM(config).train()


def sequences_of(model: Any, rows: int, grid: int, text: int = 0) -> Sequences:
    """Random images after ``text`` random text tokens (or after ``<bos>`` alone)."""
    generator = torch.Generator().manual_seed(1)
    vocabulary = model.config.vocabulary
    words = torch.randint(
        SPECIAL, max(vocabulary.text_vocab_size, SPECIAL + 1), (rows, text), generator=generator
    ).tolist()
    codes = torch.randint(vocabulary.codebook_size, (rows, grid, grid), generator=generator)
    return [
        build_sequence([TextSegment(ids, loss=False), ImageSegment(image)], vocabulary)
        for ids, image in zip(words, codes, strict=True)
    ]


def batch_of(model: Any, sequences: Sequences, p: int = 1, length: int | None = None) -> Batch:
    """Sequences at patch size p (1 for the model's own way), packed into rows of ``length`` positions if one is given."""
    return make_batch(sequences, model.config, patches(p) if p > 1 else None, length)


def plain_llama(model: Any) -> LlamaForCausalLM:
    """transformers' model with one joint table, holding the same weights as ours (1D positions)."""
    text = model.config.text_config
    joint = LlamaConfig(**{**text.to_dict(), "vocab_size": text.vocab_size + model.config.codebook_size})
    llama = LlamaForCausalLM(joint).train()
    state = {k: v for k, v in model.backbone.state_dict().items() if "rotary_emb" not in k}
    state["model.embed_tokens.weight"] = torch.cat(
        [model.get_input_embeddings().weight, model.image_embed.weight]
    ).detach()
    state["lm_head.weight"] = torch.cat([model.get_output_embeddings().weight, model.image_head.weight]).detach()
    llama.load_state_dict(state)
    return llama


def reference_loss(llama: LlamaForCausalLM, model: Any, ids: Tensor, grid: int, p: int) -> Tensor:
    """Loss of one image after ``<bos> <boi>``, written word by word: pooled embeddings, p*p cross-entropies a patch."""
    start, count = int((ids[0] < SPECIAL).int().argmin()), grid * grid
    vocab = model.config.vocabulary.text_vocab_size
    embeds = llama.get_input_embeddings()(ids)
    codes = ids[:, start : start + count].reshape(-1, grid, grid)
    side = grid // p
    windows = [(r * p, c * p) for r in range(side) for c in range(side)]
    image = embeds[:, start : start + count].reshape(-1, grid, grid, embeds.shape[-1])
    pooled = torch.stack([image[:, r : r + p, c : c + p].mean(dim=(1, 2)) for r, c in windows], dim=1)
    hidden = llama.model(
        inputs_embeds=torch.cat([embeds[:, :start], pooled, embeds[:, start + count :]], 1)
    ).last_hidden_state
    logits = llama.lm_head(hidden)
    patches = torch.stack([codes[:, r : r + p, c : c + p].flatten(1) for r, c in windows], dim=1) - vocab
    scores = logits[:, start - 1 : start - 1 + len(windows), vocab:]
    image_losses = torch.stack(
        [F.cross_entropy(scores.flatten(0, 1), patches[..., k].flatten(), reduction="none") for k in range(p * p)]
    ).mean(0)
    end = F.cross_entropy(logits[:, start - 1 + len(windows), :vocab], ids[:, -1], reduction="none")
    return (image_losses.sum() + end.sum()) / (image_losses.numel() + end.numel())


def check_losses() -> dict[str, float]:
    """Largest difference between our loss and the reference at p = 1, 2, 4; raises RuntimeError above 1e-4."""
    model = our_model(codebook=64, width=64, layers=2, grid=8)
    model.config.positions, model.config.coarse_positions = "1d", "unit"
    llama, sequences = plain_llama(model), sequences_of(model, 3, 8)
    ids = torch.stack([sequence.input_ids for sequence in sequences])
    differences = {}
    for p in (1, 2, 4):
        ours = model(**batch_of(model, sequences, p).inputs).loss
        reference = reference_loss(llama, model, ids, 8, p)
        differences[f"p={p}"] = abs(float(ours.detach()) - float(reference.detach()))
    if max(differences.values()) > 1e-4:
        raise RuntimeError(f"loss differs from the reference: {differences}")
    return differences


def trainer(model: nn.Module, loss: Callable[[], Tensor]) -> Callable[[], None]:
    """A whole training step: forward, backward, clip, AdamW."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        loss().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def ours(model: Any, sequences: Sequences, p: int = 1, length: int | None = None) -> Callable[[], None]:
    """Our training step at patch size p; arranging the sequences is part of it."""
    return trainer(model, lambda: model(**batch_of(model, sequences, p, length).inputs).loss)


def theirs(llama: LlamaForCausalLM, sequences: Sequences) -> Callable[[], None]:
    """transformers' training step on the joint vocabulary, with its own loss."""
    ids, labels = (torch.stack([getattr(s, name) for s in sequences]) for name in ("input_ids", "labels"))
    return trainer(llama, lambda: llama(input_ids=ids, labels=labels).loss)


def measure(rounds: int, llamagen: str | None, npp: str | None) -> dict[str, dict[str, Any]]:
    """All goals, with ratios above 1 when ours is faster."""
    goals: dict[str, dict[str, Any]] = {}
    model = our_model(codebook=16384)
    sequences = sequences_of(model, 8, 16)
    steps = {"hf": theirs(plain_llama(model), sequences), "p1": ours(model, sequences), "p2": ours(model, sequences, 2)}
    if llamagen:
        steps["llamagen"], steps["as llamagen"] = load_peer(llamagen, model, sequences, 16, 1, trainer)
    if npp:
        steps["npp"], steps["as npp"] = load_peer(npp, model, sequences, 16, 2, trainer)
    timings = interleaved(steps, rounds)
    goals["T1"] = compared(timings, "hf", "p1")
    if llamagen:
        goals["T1_llamagen"] = compared(timings, "llamagen", "as llamagen")
    if npp:
        goals["T2"] = compared(timings, "npp", "as npp")
    goals["T3"] = compared(timings, "p1", "p2")
    cost = [(1 + p2[1] / p1[1]) / 2 for p1, p2 in zip(timings["p1"], timings["p2"], strict=True)]
    goals["T5"] = {
        "cost": round(sorted(cost)[len(cost) // 2], 3),
        "ratio": round(1 / sorted(cost)[len(cost) // 2], 3),
        "spread": [round(1 / max(cost), 3), round(1 / min(cost), 3)],
        "meaning": "CPU cost of next-token training over that of p=2 then p=1, half and half; quality: next_x_study.py",
    }
    goals["T6"] = cached_against_in_loop(model, rounds)
    del steps, timings

    channel = our_model(codebook=16384, prediction={"merge": "channel"})
    timings = interleaved({"p1": ours(model, sequences), "channel": ours(channel, sequences)}, rounds)
    goals["N2"] = compared(timings, "p1", "channel")
    del channel, timings

    model = our_model(codebook=16384, text_vocab=20000)
    sequences = sequences_of(model, 8, 16)
    steps = {"hf": theirs(plain_llama(model), sequences), "p1": ours(model, sequences), "p2": ours(model, sequences, 2)}
    timings = interleaved(steps, rounds)
    goals["T4"], goals["T4_p2"] = (compared(timings, "hf", p) for p in ("p1", "p2"))
    return {name: {**metrics, "goal": round(GOALS[name], 3)} for name, metrics in goals.items()}


def cached_against_in_loop(model: Any, rounds: int, images_a_step: int = 2, epochs: int = 20) -> dict[str, Any]:
    """Epochs over 256 px images: encoding once and training from codes, against encoding in every step."""
    tokenizer = VQGAN(VQGANConfig()).eval()
    images = torch.rand(images_a_step, 3, 256, 256, generator=torch.Generator().manual_seed(2)) * 2 - 1
    sequences = sequences_of(model, images_a_step, 16)

    @torch.inference_mode()
    def encode() -> Tensor:
        return tokenizer.encode(images)

    timings = interleaved({"encode": encode, "p1": ours(model, sequences), "p2": ours(model, sequences, 2)}, rounds)
    ratios = []
    for (encoding, _), (fine, _), (coarse, _) in zip(timings["encode"], timings["p1"], timings["p2"], strict=True):
        step = (fine + coarse) / 2
        ratios.append((encoding + step) / (encoding / epochs + step))
    return {
        "ratio": round(sorted(ratios)[rounds // 2], 3),
        "spread": [round(min(ratios), 3), round(max(ratios), 3)],
        "meaning": f"{epochs} epochs of p=2 then p=1, half and half; encoder of VQ-16 size, {images_a_step} images a step",
    }


def saved_megabytes(model: Any, forward: Callable[[], Any]) -> float:
    """Memory of the activations that a forward pass keeps for its backward pass, in MB; shared storage counts once."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    storages: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = forward()
    del result
    # The gradient of the head's weight, made in the forward pass, is no activation.
    return (sum(storages.values()) - model.image_head.weight.nbytes) / 1e6


def sweep(rounds: int) -> list[dict[str, Any]]:
    """Time and activation memory per image against FLOPs, over grid, codebook and patch size; first row = 1."""
    rows: list[dict[str, Any]] = []
    for grid, codebook in ((8, 1024), (16, 1024), (32, 1024), (64, 1024), (16, 16384), (16, 65536)):
        model = our_model(codebook, width=256, layers=4, grid=grid)
        images = max(1, 1024 // grid**2)
        sequences = sequences_of(model, images, grid)
        timings = interleaved({str(p): ours(model, sequences, p) for p in (1, 2, 4)}, rounds)
        for p in (1, 2, 4):
            side, _ = merged_grid((grid, grid), p)
            forward = partial(model, **batch_of(model, sequences, p).inputs)
            seconds = sorted(wall for wall, _ in timings[str(p)])[rounds // 2] / images
            rows.append(
                {
                    "grid": grid, "codebook": codebook, "patch_size": p,
                    "gflops_per_image": training_flops(model.config, 3, side * side) / 1e9,
                    "activation_mb_per_image": saved_megabytes(model, forward) / images,
                    "time_per_image": seconds,
                }
            )  # fmt: skip
    first = rows[0]["time_per_image"]
    for row in rows:
        row["time_per_image"] /= first
    return rows


def mixed_lengths(model: Any, count: int, seed: int = 3) -> list[TokenSequence]:
    """Captions of 4 to 64 tokens, each before an image of one of four grids."""
    generator = torch.Generator().manual_seed(seed)
    vocabulary = model.config.vocabulary
    sequences = []
    for _ in range(count):
        words = int(torch.randint(4, 65, (), generator=generator))
        grid = ((8, 8), (8, 16), (12, 12), (16, 16))[int(torch.randint(4, (), generator=generator))]
        text = torch.randint(SPECIAL, vocabulary.text_vocab_size, (words,), generator=generator).tolist()
        codes = torch.randint(vocabulary.codebook_size, grid, generator=generator)
        sequences.append(build_sequence([TextSegment(text), ImageSegment(codes)], vocabulary))
    return sequences


def packing(rounds: int, length: int = 512, count: int = 24, **options: Any) -> dict[str, Any]:
    """Real tokens per second of a training step on packed rows, over those of the same sequences padded.

    Raises:
        RuntimeError: if the losses differ.
    """
    model = our_model(**{"codebook": 1024, "text_vocab": 4096, "width": 256, "layers": 4, **options})
    sequences = mixed_lengths(model, count)
    padded, packed = (batch_of(model, sequences, 1, size) for size in (None, length))
    tokens = padded.counts.positions
    result: dict[str, Any] = {
        "meaning": f"real tokens per second, packed over padded; {count} captions of 4 to 64 tokens with grids of 64 to 256",
        "length": length,
        "real_share_padded": round(tokens / padded.inputs["input_ids"].numel(), 3),
        "real_share_packed": round(tokens / packed.inputs["input_ids"].numel(), 3),
    }
    for p in (1, 2):
        losses = [float(model(**batch_of(model, sequences, p, size).inputs).loss.detach()) for size in (None, length)]
        if not abs(losses[0] - losses[1]) < 1e-4:
            raise RuntimeError(f"packed loss {losses[1]} differs from the padded one {losses[0]} at p = {p}")
        steps = {"padded": ours(model, sequences, p), "packed": ours(model, sequences, p, length)}
        timings = interleaved(steps, rounds)
        result[f"p{p}"] = compared(timings, "padded", "packed")
    return result


def main(argv: Sequence[str] | None = None) -> None:
    """Check, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="file to write")
    parser.add_argument("--llamagen", help="checkout of FoundationVision/LlamaGen to compare with")
    parser.add_argument("--npp", help="checkout of PKU-YuanGroup/Next-Patch-Prediction to compare with")
    parser.add_argument("--rounds", type=int, default=7, help="measured rounds (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="torch threads (default: %(default)s)")
    parser.add_argument("--sweep", action="store_true", help="also cost over grid, vocabulary and patch size")
    parser.add_argument("--packing", action="store_true", help="also packed against padded rows of mixed lengths")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    result: dict[str, Any] = {
        "conditions": {
            "torch": torch.__version__, "threads": args.threads, "rounds": args.rounds, "dtype": "float32",
            "model": "Llama, width 384, 6 layers, 6 heads, MLP 1024",
            "batch": "8 images of 16x16 codes after <bos>, a class against LlamaGen and the NPP code",
            "codebook": 16384, "joint vocabulary of T4": 36384, "mode": "eager, dropout 0, AdamW fused, clip 1",
            "ratios": "wall time, median of paired rounds, spread = min and max, CPU time under cpu; T5: CPU time",
        },
        "loss_difference_to_reference": check_losses(),
    }  # fmt: skip
    print("largest loss difference to the reference:", max(result["loss_difference_to_reference"].values()))
    result["goals"] = measure(args.rounds, args.llamagen, args.npp)
    for name, goal in result["goals"].items():
        cpu = f", CPU {goal['cpu']['ratio']:.2f}" if "cpu" in goal else ""
        print(
            f"{name:<12} {goal['ratio']:>7.2f}  ({goal['spread'][0]} to {goal['spread'][1]}){cpu}, goal {goal['goal']}"
        )
    if args.packing:
        result["packing"] = packing(args.rounds)
        print("packing", json.dumps(result["packing"]))
    if args.sweep:
        result["sweep"] = sweep(max(3, args.rounds // 2))
        for row in result["sweep"]:
            print("  ".join(f"{k}={v:.3g}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items()))
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()

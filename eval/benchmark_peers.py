"""Training steps and sampling loops of other projects, from a checkout that the user names. Their code runs as it is."""

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from unified.convert import llamagen_from_weights
from unified.data.batches import make_batch
from unified.decoding import Sampling
from unified.model.prefix import condition_positions
from unified.prediction.merge import patches
from unified.sequence import ImageSegment, TokenSequence, build_sequence

Trainer = Callable[[nn.Module, Callable[[], Tensor]], Callable[[], None]]


def import_checkout(folder: str, field: str, *modules: str) -> list[Any]:
    """Modules of a checkout, and none that an earlier one has left: checkouts use the same package names.

    Raises:
        ValueError: naming ``field``, if the folder lacks one of them.
    """
    root = Path(folder).resolve()
    for file in (f"{module.replace('.', '/')}.py" for module in modules):
        if not (root / file).is_file():
            raise ValueError(f"{field}: {folder!r} has no {file}; give the root of a clone.")
    for name in [name for name in sys.modules if name.split(".")[0] in ("autoregressive", "utils")]:
        del sys.modules[name]
    sys.path.insert(0, str(root))
    try:
        return [importlib.import_module(module) for module in modules]
    finally:
        sys.path.remove(str(root))


def take_whole_codes(gpt: Any) -> None:
    """Let the NPP fork cut windows of codes: it does so by F.unfold, which knows no integers on a CPU."""
    patchify = gpt.target_patchify
    gpt.target_patchify = lambda codes, **sizes: patchify(codes.double(), **sizes).long()


def load_peer(
    folder: str, model: Any, sequences: list[TokenSequence], grid: int, p: int, trainer: Trainer
) -> tuple[Callable[[], None], Callable[[], None]]:
    """Training steps of LlamaGen's (or the NPP fork's) class-conditional model, and of ours with the same weights and data.

    The two losses are compared before the steps are returned.

    Args:
        folder: checkout with ``autoregressive/models/gpt.py``.
        model: our model, for its sizes.
        sequences: ours, for their codes.
        grid: side of the code grid.
        p: patch size; above 1 only for the NPP fork.
        trainer: makes a step of a model and its loss.

    Raises:
        ValueError: if the folder is not such a checkout.
        RuntimeError: if the losses differ.
    """
    (gpt,) = import_checkout(folder, "checkout", "autoregressive.models.gpt")
    if p > 1:
        take_whole_codes(gpt)
    text = model.config.text_config
    arguments = gpt.ModelArgs(
        dim=text.hidden_size, n_layer=text.num_hidden_layers, n_head=text.num_attention_heads, block_size=grid * grid,
        vocab_size=model.config.codebook_size, token_dropout_p=0.0, resid_dropout_p=0.0, ffn_dropout_p=0.0,
        class_dropout_prob=0.0,
    )  # fmt: skip
    peer = gpt.Transformer(arguments).train()
    torch.nn.init.normal_(peer.output.weight, std=0.02)  # theirs starts at zero, where every loss is ln K
    ids = torch.stack([sequence.input_ids for sequence in sequences])
    codes = (
        ids[ids >= model.config.vocabulary.text_vocab_size].reshape(len(ids), -1)
        - model.config.vocabulary.text_vocab_size
    )
    classes = torch.zeros(len(ids), dtype=torch.int64)
    options = {}
    if p > 1:
        coarse = gpt.precompute_freqs_cis_2d(grid // p, text.hidden_size // text.num_attention_heads, 10000, 1)
        options = {"p": p, "patch_size": p * p, "freqs_cis": coarse}
    given = codes[:, :-1] if p == 1 else codes  # the fork cuts off the last patch by itself

    def loss() -> Tensor:
        return peer(idx=given, cond_idx=classes, targets=codes, **options)[1]

    state = {name: value for name, value in peer.state_dict().items() if "kv_cache" not in name}
    twin = llamagen_from_weights(state, "random weights", num_attention_heads=text.num_attention_heads).train()
    vocabulary = twin.config.vocabulary
    images = codes.reshape(-1, grid, grid)
    conditioned = [build_sequence([condition_positions(1, vocabulary), ImageSegment(c)], vocabulary) for c in images]

    def our_loss() -> Tensor:
        return twin(**make_batch(conditioned, twin.config, patches(p)).inputs, condition=classes).loss

    ours, theirs = float(our_loss().detach()), float(loss().detach())
    if not abs(ours - theirs) < 1e-4:
        raise RuntimeError(f"loss: {ours} by ours and {theirs} by the peer at p = {p}; not timing this.")
    return trainer(peer, loss), trainer(twin, our_loss)


def transformers_generate(
    llama: Any, special: int, start: list[int], nothing: list[int], grid: int, sampling: Sampling, batch: int = 1
) -> Callable[[], Tensor]:
    """Sample by transformers: one joint table, ``generate()`` with its own guidance; the ``special`` text ids suppressed."""
    ids = torch.tensor([start] * batch)
    options = {
        "attention_mask": torch.ones_like(ids), "negative_prompt_ids": torch.tensor([nothing] * batch),
        "negative_prompt_attention_mask": torch.ones(batch, len(nothing), dtype=torch.int64),
        "guidance_scale": sampling.guidance_scale, "max_new_tokens": grid * grid, "min_new_tokens": grid * grid,
        "do_sample": sampling.top_k != 1, "suppress_tokens": list(range(special)), "pad_token_id": 0,
    }  # fmt: skip
    if sampling.top_k != 1:
        options |= {"top_k": sampling.top_k, "top_p": 1.0, "temperature": 1.0}
    return lambda: llama.generate(ids, **options)[:, ids.shape[1] :].reshape(-1, grid, grid) - special


def load_llamagen(folder: str, width: int, layers: int, heads: int, codebook: int, grid: int) -> tuple[Any, Any, Any]:
    """LlamaGen's module ``generate``, its model with random weights, and ours with the same ones.

    Raises:
        ValueError: if the folder is not a checkout of LlamaGen.
    """
    generate, gpt = import_checkout(folder, "llamagen", "autoregressive.models.generate", "autoregressive.models.gpt")
    torch.manual_seed(0)
    arguments = gpt.ModelArgs(dim=width, n_layer=layers, n_head=heads, vocab_size=codebook, block_size=grid * grid)
    peer = gpt.Transformer(arguments).eval()
    torch.nn.init.normal_(peer.output.weight, std=0.2)  # theirs starts at zero, where every code is alike
    state = {name: value for name, value in peer.state_dict().items() if "kv_cache" not in name}
    return generate, peer, llamagen_from_weights(state, "random weights", num_attention_heads=heads)


def llamagen_generate(generate: Any, peer: Any, grid: int, sampling: Sampling, batch: int = 1) -> Callable[[], Tensor]:
    """LlamaGen samples class 7."""
    options = {"cfg_scale": sampling.guidance_scale, "top_k": sampling.top_k, "temperature": 1.0, "top_p": 1.0}
    classes = torch.full((batch,), 7)
    return lambda: generate.generate(peer, classes, grid * grid, **options).reshape(-1, grid, grid).long()

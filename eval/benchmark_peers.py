"""Training steps of other projects, from a checkout that the user names. Their code runs as it is."""

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

Trainer = Callable[[nn.Module, Callable[[], Tensor]], Callable[[], None]]


def load_peer(
    folder: str, model: Any, batch: dict[str, Tensor], grid: int, p: int, trainer: Trainer
) -> Callable[[], None]:
    """A training step of LlamaGen's (or the NPP fork's) class-conditional model, at the size of ours.

    Args:
        folder: checkout with ``autoregressive/models/gpt.py``.
        model: our model, for its sizes.
        batch: our batch, for its codes.
        grid: side of the code grid.
        p: patch size; above 1 only for the NPP fork.
        trainer: makes a step of a model and its loss.

    Raises:
        ValueError: if the folder is not such a checkout.
    """
    root = Path(folder).resolve()
    if not (root / "autoregressive" / "models" / "gpt.py").is_file():
        raise ValueError(f"checkout: {folder!r} has no autoregressive/models/gpt.py; give the root of a clone.")
    for name in [n for n in sys.modules if n.split(".")[0] in ("autoregressive", "utils")]:
        del sys.modules[name]  # both checkouts use the same package names
    sys.path.insert(0, str(root))
    try:
        gpt: Any = importlib.import_module("autoregressive.models.gpt")
        if p > 1:
            patchify = gpt.target_patchify
            # Its windows are cut by F.unfold, which knows no integers on a CPU: cast there and back, so that it runs.
            gpt.target_patchify = lambda codes, **kw: patchify(codes.double(), **kw).long()
    finally:
        sys.path.remove(str(root))
    text = model.config.text_config
    arguments = gpt.ModelArgs(
        dim=text.hidden_size, n_layer=text.num_hidden_layers, n_head=text.num_attention_heads, block_size=grid * grid,
        vocab_size=model.config.codebook_size, token_dropout_p=0.0, resid_dropout_p=0.0, ffn_dropout_p=0.0,
        class_dropout_prob=0.1,
    )  # fmt: skip
    peer = gpt.Transformer(arguments).train()
    ids = batch["input_ids"]
    codes = ids[ids >= model.config.layout.text_vocab_size].reshape(len(ids), -1) - model.config.layout.text_vocab_size
    classes = torch.zeros(len(ids), dtype=torch.int64)
    if p == 1:
        return trainer(peer, lambda: peer(idx=codes[:, :-1], cond_idx=classes, targets=codes)[1])
    coarse = gpt.precompute_freqs_cis_2d(grid // p, text.hidden_size // text.num_attention_heads, 10000, 1)
    return trainer(
        peer,
        lambda: peer(idx=codes, cond_idx=classes, targets=codes, p=p, patch_size=p * p, freqs_cis=coarse)[1],
    )

"""How the image tables of a model start that is built on a pretrained language model."""

from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from unified.model.modeling import UnifiedForCausalLM

EMBED_KINDS = ("text", "normal", "codebook")
HEAD_KINDS = ("normal", "text", "zero", "tied-like")


@torch.no_grad()
def initialize_image_tables(
    model: "UnifiedForCausalLM",
    embed: str = "text",
    head: str = "normal",
    codebook: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> None:
    """Write the image embedding ``(K, D)`` and the weight of the image head ``(K, D)`` again.

    Args:
        model: the model, its backbone already holding the pretrained weights.
        embed: ``text`` samples rows with the mean and the per-dimension spread of the text embedding, ``normal`` with the
            backbone's ``initializer_range``; ``codebook`` turns the image tokenizer's code vectors at random into width D
            and gives them the mean and spread of the text embedding, so that similar codes start similar.
        head: ``text`` and ``normal`` likewise, from the text head; ``zero`` makes all codes equally likely, a loss of
            ln K; ``tied-like`` takes the rows of the image embedding, centred and with the spread of the text head.
        codebook: code vectors ``(K, d)``, as the image tokenizer's ``codebook_vectors`` gives them; for ``codebook`` alone.
        generator: seeds it all; default torch's own.

    Raises:
        ValueError: for an unknown kind, or a codebook that is missing, of another size, or flat.
    """
    for name, kind, kinds in (("image_init", embed, EMBED_KINDS), ("head_init", head, HEAD_KINDS)):
        if kind not in kinds:
            raise ValueError(f"{name}: {kind!r} is unknown; use one of {kinds}.")
    deviation = getattr(model.config.text_config, "initializer_range", 0.02)
    table, scores = model.image_embed.weight, model.image_head.weight
    text, text_head = cast(nn.Embedding, model.get_input_embeddings()), cast(nn.Linear, model.get_output_embeddings())
    # Through the module, because some backbones (Gemma 3) scale what they look up.
    looked_up = text(torch.arange(model.config.vocabulary.text_vocab_size, device=table.device)).float()
    if embed == "normal":
        table.normal_(0, deviation, generator=generator)
    else:
        directions = _noise(table, generator) if embed == "text" else _turned(codebook, table, generator)
        table.copy_(looked_up.mean(dim=0) + directions * looked_up.std(dim=0))
    text_scores = text_head.weight.float()
    if head == "zero":
        scores.zero_()
    elif head == "normal":
        scores.normal_(0, deviation, generator=generator)
    elif head == "text":
        scores.copy_(text_scores.mean(dim=0) + _noise(scores, generator) * text_scores.std(dim=0))
    else:
        scores.copy_(_standard(table.float()) * text_scores.std(dim=0))


def _noise(like: Tensor, generator: torch.Generator | None) -> Tensor:
    return torch.randn(like.shape, generator=generator, device=like.device)


def _turned(codebook: Tensor | None, table: Tensor, generator: torch.Generator | None) -> Tensor:
    """Code vectors through a random orthonormal projection, each dimension with mean 0 and spread 1."""
    if codebook is None:
        raise ValueError("image_init: 'codebook' needs code vectors, and the image tokenizer has none; use 'text'.")
    if codebook.ndim != 2 or len(codebook) != len(table):
        raise ValueError(
            f"codebook: shape {tuple(codebook.shape)} does not give one vector to each of {len(table)} codes."
        )
    projection = torch.empty(codebook.shape[1], table.shape[1], device=table.device)
    nn.init.orthogonal_(projection, generator=generator)
    return _standard(codebook.to(projection) @ projection)


def _standard(rows: Tensor) -> Tensor:
    spread = rows.std(dim=0)
    if not (spread > 0).all():
        raise ValueError(
            "codebook: a dimension has no spread over the codes; use other kinds of image_init and head_init."
        )
    return (rows - rows.mean(dim=0)) / spread

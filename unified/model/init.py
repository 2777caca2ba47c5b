"""How the image tables of a model start that is built on a pretrained language model."""

import torch
from torch import Tensor, nn

EMBED_KINDS = ("text", "normal", "codebook")
HEAD_KINDS = ("normal", "text", "zero", "tied-like")


@torch.no_grad()
def initialize_image_tables(
    image_embed: Tensor,
    image_head: Tensor,
    text_embed: nn.Module,
    text_head: Tensor,
    vocab_size: int,
    initializer_range: float = 0.02,
    image_init: str = "text",
    head_init: str = "normal",
    codebook: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> None:
    """Write both image tables.

    Args:
        image_embed: the weight of the image embedding ``(K, D)``, written in place.
        image_head: the weight of the image head ``(K, D)``, written in place.
        text_embed: the text embedding, ids to ``(..., D)``; a module, because some backbones (Gemma 3) scale its rows.
        text_head: the weight of the text head ``(V_text, D)``.
        vocab_size: number of text ids V_text.
        initializer_range: standard deviation of ``normal``.
        image_init: ``text`` samples rows with the mean and the per-dimension spread of the text embedding, ``normal`` with
            ``initializer_range``; ``codebook`` turns the image tokenizer's code vectors at random into width D and gives
            them the mean and spread of the text embedding, so that similar codes start similar.
        head_init: ``text`` and ``normal`` likewise, from the text head; ``zero`` makes all codes equally likely, a loss of
            ln K; ``tied-like`` takes the rows of the image embedding, centred and with the spread of the text head.
        codebook: code vectors ``(K, d)``, as the image tokenizer's ``codebook_vectors`` gives them; for ``codebook`` alone.
        generator: makes the random numbers; default torch's global one.

    Raises:
        ValueError: for an unknown kind, or a codebook that is missing, of another size, or flat.
    """
    for name, kind, kinds in (("image_init", image_init, EMBED_KINDS), ("head_init", head_init, HEAD_KINDS)):
        if kind not in kinds:
            raise ValueError(f"{name}: {kind!r} is unknown; use one of {kinds}.")
    if image_init == "normal":
        image_embed.normal_(0, initializer_range, generator=generator)
    else:
        text = text_embed(torch.arange(vocab_size, device=image_embed.device)).float()
        directions = (
            _noise(image_embed, generator) if image_init == "text" else _turned(codebook, image_embed, generator)
        )
        image_embed.copy_(text.mean(dim=0) + directions * text.std(dim=0))
    if head_init == "zero":
        image_head.zero_()
    elif head_init == "normal":
        image_head.normal_(0, initializer_range, generator=generator)
    else:
        text_rows = text_head.float()  # made only where it is read: a text head may have gigabytes
        if head_init == "text":
            image_head.copy_(text_rows.mean(dim=0) + _noise(image_head, generator) * text_rows.std(dim=0))
        else:
            image_head.copy_(_standard(image_embed.float()) * text_rows.std(dim=0))


def _noise(like: Tensor, generator: torch.Generator | None) -> Tensor:
    return torch.randn(like.shape, generator=generator, device=like.device)


def _turned(codebook: Tensor | None, table: Tensor, generator: torch.Generator | None) -> Tensor:
    """Code vectors through a random orthonormal projection, each dimension with mean 0 and spread 1."""
    if codebook is None:
        raise ValueError("image_init: 'codebook' needs code vectors, and the image tokenizer has none; use 'text'.")
    if codebook.ndim != 2 or len(codebook) != len(table):
        raise ValueError(f"codebook: shape {tuple(codebook.shape)} is not one vector for each of {len(table)} codes.")
    projection = torch.empty(codebook.shape[1], table.shape[1], device=table.device)
    nn.init.orthogonal_(projection, generator=generator)
    return _standard(codebook.to(projection) @ projection)


def _standard(rows: Tensor) -> Tensor:
    """Each dimension with mean 0 and spread 1 over the rows."""
    spread = rows.std(dim=0)
    if not (spread > 0).all():
        raise ValueError(
            "codebook: all codes have the same value in a dimension; use another image_init and head_init."
        )
    return (rows - rows.mean(dim=0)) / spread

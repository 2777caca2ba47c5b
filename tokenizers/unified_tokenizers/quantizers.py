"""Quantizers that are trained with the tokenizer around them and that vector-quantize-pytorch lacks: by bits, and IBQ.

Each maps ``(..., d)`` to vectors ``(..., d)``, codes ``(...)`` and a loss, and codes to vectors by ``indices_to_codes``.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_INVERSE_TEMPERATURE = 100.0  # of the soft choice whose entropy is measured


def index_backpropagation(latents: Tensor, vectors: Tensor, entropy_weight: float) -> tuple[Tensor, Tensor, Tensor]:
    """Codes of IBQ (arXiv 2412.02692, section 3.2), differentiable in all vectors at once.

    A latent's code is that of the greatest product. Its vector has the gradient of the mean vector under the softmax over
    products, so that training reaches the whole codebook.

    Args:
        latents: ``(N, d)``.
        vectors: the codebook ``(K, d)``; ``(N, K)`` products are held at once.
        entropy_weight: of the term that makes each choice sure and all codes equally frequent.

    Returns:
        The chosen vectors ``(N, d)``, the codes ``(N,)``, and the loss but for the codebook's pull towards the latents.
    """
    products = latents @ vectors.T
    shares = products.softmax(dim=-1)
    codes = shares.argmax(-1)
    chosen = F.one_hot(codes, len(vectors)).to(shares.dtype) - shares.detach() + shares
    quantized = chosen @ vectors
    loss = F.mse_loss(quantized, latents) + F.mse_loss(latents, vectors[codes].detach())
    if entropy_weight:
        logs = (products * _INVERSE_TEMPERATURE).log_softmax(dim=-1)
        each = -(logs.exp() * logs).sum(-1).mean()
        loss = loss + entropy_weight * (each - _entropy(logs.exp().mean(0)).sum())
    return quantized, codes, loss


class IndexQuantizer(nn.Module):
    """A codebook with :func:`index_backpropagation`.

    Args:
        codebook_size, dim: shape of the codebook.
        entropy_weight: see :func:`index_backpropagation`.
        commitment_weight: weight of the codebook's pull towards the latents.
    """

    def __init__(self, codebook_size: int, dim: int, entropy_weight: float, commitment_weight: float = 0.25):
        super().__init__()
        self.entropy_weight, self.commitment_weight = entropy_weight, commitment_weight
        self.embedding = nn.Embedding(codebook_size, dim)

    def forward(self, latents: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # noqa: D102
        rows, vectors = latents.flatten(0, -2), self.embedding.weight
        quantized, codes, loss = index_backpropagation(rows, vectors, self.entropy_weight)
        loss = loss + self.commitment_weight * F.mse_loss(vectors[codes], rows.detach())
        return quantized.view_as(latents), codes.view(latents.shape[:-1]), loss

    def indices_to_codes(self, codes: Tensor) -> Tensor:
        """The vectors of codes."""
        return self.embedding(codes)


class BinaryQuantizer(nn.Module):
    """One bit for each dimension, the first the highest: LFQ (arXiv 2310.05737), or BSQ on the sphere (arXiv 2406.07548).

    The entropy term makes each choice sure and all codes equally frequent. The soft choice among all codes is one among two
    values in every dimension apart, so its entropy is a sum over dimensions. For the frequency of codes that sum is what BSQ
    takes, an upper bound: no time or memory depends on the number of codes.

    Args:
        bits: number of dimensions; ``2 ** bits`` codes.
        spherical: whether latents and vectors are normalised to length 1.
        entropy_weight: weight of the entropy term.
    """

    mask: Tensor

    def __init__(self, bits: int, spherical: bool, entropy_weight: float):
        super().__init__()
        self.spherical, self.entropy_weight = spherical, entropy_weight
        self.scale = bits**-0.5 if spherical else 1.0  # of a vector's entries
        self.register_buffer("mask", 2 ** torch.arange(bits - 1, -1, -1))

    def forward(self, latents: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # noqa: D102
        latents = F.normalize(latents, dim=-1) if self.spherical else latents
        positive = latents > 0
        hard = torch.where(positive, self.scale, -self.scale).to(latents.dtype)
        loss = self.entropy_weight * self.entropy(latents)
        return latents + (hard - latents).detach(), (positive * self.mask).sum(-1), loss

    def entropy(self, latents: Tensor) -> Tensor:
        """Mean entropy of the soft choices less that of their mean, in nats."""
        logits = 4 * _INVERSE_TEMPERATURE * self.scale * latents.flatten(0, -2)
        soft = logits.sigmoid()
        each, mean = F.softplus(logits) - logits * soft, soft.mean(0)
        return each.sum(-1).mean() - (_entropy(mean) + _entropy(1 - mean)).sum()

    def indices_to_codes(self, codes: Tensor) -> Tensor:
        """The vectors of codes."""
        return ((codes[..., None] & self.mask) != 0) * (2 * self.scale) - self.scale


def _entropy(shares: Tensor) -> Tensor:
    """Their contributions to an entropy; one of 0 has no gradient rather than an infinite one."""
    return torch.special.entr(shares.clamp_min(1e-8))

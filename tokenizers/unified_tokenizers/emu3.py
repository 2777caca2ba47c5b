"""Emu3's video tokenizer (arXiv 2409.18869) on single images, through transformers."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Emu3VQVAE, Emu3VQVAEConfig

from unified_tokenizers.base import check_codes, check_images, fingerprint_of, full_precision
from unified_tokenizers.checkpoint import check_counts, check_weights, load_whole
from unified_tokenizers.hub import local_path, on_the_hub
from unified_tokenizers.weights import Stored, load_exactly


class Emu3Tokenizer(nn.Module):
    """Implements :class:`unified_tokenizers.base.ImageTokenizer` around transformers' ``Emu3VQVAE``.

    An image is encoded as a clip of equal frames and decoded to the first frame, as Emu3 does.
    """

    def __init__(self, model: Emu3VQVAE):
        super().__init__()
        self.model = model

    @classmethod
    def from_weights(cls, config: Emu3VQVAEConfig, state: dict[str, Tensor], source: str) -> "Emu3Tokenizer":
        """Build from tensors by name; raises ValueError on any that is missing, not expected or of another shape."""
        size = Stored(len(state), sum(value.numel() for value in state.values()), 0)
        check_counts(config.to_dict(), size, source)
        check_weights(lambda: Emu3VQVAE(config), size, source)
        model = Emu3VQVAE(config)
        load_exactly(model, {name: value.float() for name, value in state.items()}, source)
        return cls(model.eval())

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> "Emu3Tokenizer":
        """Load a folder or Hub repository that holds the tokenizer alone.

        Raises:
            ValueError: as :func:`unified_tokenizers.checkpoint.load_whole`.
        """
        path = local_path(pretrained_model_name_or_path, "image_tokenizer") or str(pretrained_model_name_or_path)

        def build() -> Emu3VQVAE:
            return Emu3VQVAE(Emu3VQVAEConfig.from_pretrained(path))

        with on_the_hub(path, "image_tokenizer"):
            return cls(load_whole(Emu3VQVAE.from_pretrained, build, path, **kwargs)[0].eval())

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """See :meth:`ImageTokenizer.encode`. Raises ValueError on a wrong shape or a size the stride does not divide."""
        check_images(images, self.downsample)
        sizes = torch.tensor([images.shape[-2:]] * len(images))
        pixels = images.to(self.model.device, self.model.dtype)
        with full_precision(self.model.device, self.model.dtype):
            return torch.stack(self.model.encode(pixels, sizes).image_tokens)

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """See :meth:`ImageTokenizer.decode`. Raises ValueError on codes outside the codebook."""
        check_codes(codes, self.codebook_size)
        return self.model.decode(codes.to(self.model.device)).clamp(-1, 1)

    def codebook_vectors(self) -> Tensor:
        """Vectors ``(K, d)`` of the codes as the decoder gets them."""
        return self.model.quantize.embedding.weight.detach()

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Write the configuration and the safetensors weights to a folder."""
        self.model.save_pretrained(save_directory)

    @property
    def codebook_size(self) -> int:
        """Number of codes."""
        return self.model.config.codebook_size

    @property
    def downsample(self) -> int:
        """Pixels per code along each side."""
        return self.model.spatial_scale_factor

    @property
    def fingerprint(self) -> str:
        """Hash of the weights and of what gives them meaning."""
        described = {"temporal_downsample_factor": self.model.config.temporal_downsample_factor}
        return fingerprint_of(self.model.state_dict(), described)

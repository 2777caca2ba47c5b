"""A custom image tokenizer: the mean colour of every patch, rounded. It has no weights.

unified encode --import examples/tokenizer.py --image-tokenizer FOLDER --source data/openmoji --out data/codes
"""

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unified import register
from unified_tokenizers.base import check_codes, check_images, fingerprint_of


class MeanColours(nn.Module):
    """A code is the mean colour of a patch in ``levels`` steps a channel.

    Args:
        downsample: side of a patch in pixels.
        levels: values of each of red, green and blue; the codebook has ``levels ** 3`` codes.
    """

    def __init__(self, downsample: int = 4, levels: int = 8):
        super().__init__()
        self.downsample, self.levels = downsample, levels
        steps = torch.linspace(-1, 1, levels)
        self.register_buffer("colours", torch.cartesian_prod(steps, steps, steps), persistent=False)

    @property
    def config(self) -> dict[str, object]:
        """What ``config.json`` holds; ``model_type`` is the registered name."""
        return {"model_type": "mean_colours", "downsample": self.downsample, "levels": self.levels}

    @property
    def codebook_size(self) -> int:
        """Number of codes."""
        return self.levels**3

    @property
    def fingerprint(self) -> str:
        """Two tokenizers of the same settings are the same."""
        return fingerprint_of({}, self.config)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """``(B, 3, H, W)`` in [-1, 1] to codes ``(B, h, w)``."""
        check_images(images, self.downsample)
        means = F.avg_pool2d(images.to(self.colours.device), self.downsample)
        steps = ((means + 1) / 2 * (self.levels - 1)).round().long()
        return (steps[:, 0] * self.levels + steps[:, 1]) * self.levels + steps[:, 2]

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """Codes ``(B, h, w)`` to images ``(B, 3, H, W)``."""
        check_codes(codes, self.codebook_size)
        colours = self.colours[codes.to(self.colours.device)].permute(0, 3, 1, 2)
        return F.interpolate(colours, scale_factor=self.downsample)

    def codebook_vectors(self) -> Tensor:
        """The colours ``(K, 3)``."""
        return self.colours

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Write ``config.json``; there are no weights."""
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        (Path(save_directory) / "config.json").write_text(json.dumps(self.config))

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "MeanColours":
        """Read a folder that :meth:`save_pretrained` wrote."""
        config = json.loads((Path(folder) / "config.json").read_text())
        return cls(config["downsample"], config["levels"])


register("mean_colours", tokenizer=MeanColours)

"""A stand-in CLIP of mean colours, for tests that need a known one."""

import numpy as np
import torch
from PIL import Image


class ColourModel(torch.nn.Module):
    """A stand-in CLIP: an image's feature is its mean colour, a text's is looked up by its first token."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(1))
        self.visual = torch.nn.Module()
        self.visual.preprocess_cfg = {"size": 4}  # type: ignore[assignment]

    def encode_image(self, pixels: torch.Tensor) -> torch.Tensor:
        return pixels.mean((2, 3))

    def encode_text(self, tokens: torch.Tensor) -> torch.Tensor:
        return torch.eye(3)[tokens[:, 0] - 1]


def pixels(image: Image.Image) -> torch.Tensor:
    """``(3, H, W)`` in [0, 1]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255

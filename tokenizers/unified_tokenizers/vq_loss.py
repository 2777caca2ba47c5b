"""Losses of a tokenizer besides the pixel error: perceptual distances and a patch discriminator."""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import vgg16

from unified_tokenizers.weights import load_exactly, read_weights

PERCEPTUAL = ("edges", "lpips")


class EdgeLoss(nn.Module):
    """Absolute difference of the gradients of two images at several scales; needs no weights.

    A blurred edge costs little squared error and much of this one. It is no model of human perception.
    """

    def __init__(self, scales: int = 3):
        super().__init__()
        self.scales = scales

    def forward(self, decoded: Tensor, images: Tensor) -> Tensor:
        """Mean over images, scales and both directions of ``(B, 3, H, W)`` in [-1, 1]."""
        difference, total = decoded - images, decoded.new_zeros(())
        for scale in range(self.scales):
            if scale:
                difference = F.avg_pool2d(difference, 2)
            total = total + difference.diff(dim=-1).abs().mean() + difference.diff(dim=-2).abs().mean()
        return total / (2 * self.scales)


class LPIPS(nn.Module):
    """Perceptual distance on VGG16 features (arXiv 1801.03924); weights come from files and are never random.

    Args:
        backbone: file with torchvision's VGG16 (``vgg16-397923af.pth``), all of it or its ``features``.
        linear: file with the five linear layers of LPIPS 0.1 (``vgg.pth`` of the lpips package). Either may also be a
            file on the Hub, ``hf-hub:owner/name/file``.

    Raises:
        ValueError: if a file is missing, of another network, or holds more than tensors.
    """

    TAPS = (3, 8, 15, 22, 29)  # the activation before every pooling, and the last
    WIDTHS = (64, 128, 256, 512, 512)
    shift: Tensor
    scale: Tensor

    def __init__(self, backbone: str | Path, linear: str | Path):
        super().__init__()
        self.features = vgg16(weights=None).features[: self.TAPS[-1] + 1]
        for module in self.features:
            if isinstance(module, nn.ReLU):
                module.inplace = False
        state = read_weights(backbone)
        within = {name: value for name, value in state.items() if not name.startswith("classifier.")}
        load_exactly(
            self.features, {name.removeprefix("features."): value for name, value in within.items()}, str(backbone)
        )
        self.linear = nn.ModuleList(nn.Conv2d(width, 1, 1, bias=False) for width in self.WIDTHS)
        layers = {
            name.replace(".model.1.", ".").removeprefix("lin"): value for name, value in read_weights(linear).items()
        }
        load_exactly(self.linear, layers, str(linear))
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188])[:, None, None], persistent=False)
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450])[:, None, None], persistent=False)
        self.eval().requires_grad_(False)

    def distances(self, a: Tensor, b: Tensor) -> Tensor:
        """Distance of each pair of images, ``(B,)``, for two ``(B, 3, H, W)`` in [-1, 1] of at least 16 pixels a side."""
        x = (torch.cat([a, b]) - self.shift) / self.scale
        total = x.new_zeros(len(a))
        for index, module in enumerate(self.features):
            x = module(x)
            if index in self.TAPS:
                unit = x / (x.square().sum(dim=1, keepdim=True) + 1e-8).sqrt()
                squared = (unit[: len(a)] - unit[len(a) :]).square()
                total = total + self.linear[self.TAPS.index(index)](squared).mean(dim=(1, 2, 3))
        return total

    def forward(self, decoded: Tensor, images: Tensor) -> Tensor:
        """Mean distance over the batch."""
        return self.distances(decoded, images).mean()


def build_perceptual(name: str | None, weights: Sequence[str]) -> nn.Module | None:
    """The perceptual loss ``edges`` or ``lpips``, or None.

    Raises:
        ValueError: if the name is unknown, or ``lpips`` lacks its two weights files.
    """
    if name is None:
        return None
    if name not in PERCEPTUAL:
        raise ValueError(f"perceptual: {name!r} is unknown; use one of {PERCEPTUAL}.")
    if name == "edges":
        return EdgeLoss()
    if len(weights) != 2:
        raise ValueError(
            f"lpips_weights: {list(weights)} given; perceptual 'lpips' needs two files, torchvision's vgg16 and the linear "
            "layers of LPIPS. 'edges' needs none."
        )
    return LPIPS(*weights)


class PatchDiscriminator(nn.Sequential):
    """Scores of overlapping patches (arXiv 1611.07004): ``(B, 3, H, W)`` to ``(B, 1, h, w)``, high for real ones.

    Args:
        channels: width of the first layer.
        layers: layers that halve the sides; a patch is about ``2 ** (layers + 2)`` pixels wide.
    """

    def __init__(self, channels: int = 64, layers: int = 3):
        widths = [channels * min(2**i, 8) for i in range(layers + 1)]
        blocks: list[nn.Module] = [nn.Conv2d(3, channels, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for index, (before, width) in enumerate(pairwise(widths)):
            stride = 2 if index < layers - 1 else 1
            blocks += [nn.Conv2d(before, width, 4, stride, 1, bias=False), nn.GroupNorm(8, width), nn.LeakyReLU(0.2)]
        super().__init__(*blocks, nn.Conv2d(widths[-1], 1, 4, padding=1))


def hinge_loss(real: Tensor, fake: Tensor) -> Tensor:
    """Hinge loss of a discriminator: real patches should score above 1, decoded ones below -1 (arXiv 1705.02894)."""
    return (F.relu(1 - real).mean() + F.relu(1 + fake).mean()) / 2


def adaptive_weight(reconstruction: Tensor, adversarial: Tensor, last_weight: Tensor) -> Tensor:
    """Weight that makes both losses pull equally at the decoder's last layer (arXiv 2012.09841, equation 7); at most 1e4."""
    by_pixels = torch.autograd.grad(reconstruction, last_weight, retain_graph=True)[0].norm()
    by_discriminator = torch.autograd.grad(adversarial, last_weight, retain_graph=True)[0].norm()
    return (by_pixels / (by_discriminator + 1e-4)).clamp(max=1e4).detach()

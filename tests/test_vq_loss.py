"""Losses of tokenizer training against values by hand and against torchmetrics."""

import pytest
import torch
from torchmetrics.functional.image.lpips import _LPIPS
from torchvision.models import vgg16

from unified_tokenizers.vq_loss import (
    LPIPS,
    EdgeLoss,
    PatchDiscriminator,
    adaptive_weight,
    build_perceptual,
    hinge_loss,
)


def test_edges_by_hand():
    """A step of height 2 at one column of a 4 x 4 image; the second scale halves the sides."""
    images = torch.zeros(1, 3, 4, 4)
    decoded = images.clone()
    decoded[..., 2:] = 2.0
    # Scale 0: of 4 x 3 horizontal differences 4 are 2. Scale 1: 2 x 2 pixels, both differences are 2. No vertical ones.
    expected = (2 * 4 / 12 + 2) / 4
    torch.testing.assert_close(EdgeLoss(scales=2)(decoded, images), torch.tensor(expected))
    assert EdgeLoss()(decoded.repeat(1, 1, 4, 4), decoded.repeat(1, 1, 4, 4)) == 0
    # A constant shift has no edges: this is what the pixel error is for.
    assert EdgeLoss()(torch.ones(1, 3, 16, 16), torch.zeros(1, 3, 16, 16)) == 0


@pytest.fixture(scope="module")
def lpips_files(tmp_path_factory):
    """Random VGG16 and linear layers, in the files' published layouts, and torchmetrics' network around them."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("lpips")
    theirs = _LPIPS(pretrained=False, net="vgg", pnet_rand=True)
    backbone = vgg16(weights=None).features
    slices = [
        layer for name in ("slice1", "slice2", "slice3", "slice4", "slice5") for layer in getattr(theirs.net, name)
    ]
    for target, source in zip(slices, backbone, strict=False):
        target.load_state_dict(source.state_dict())
    for layer in theirs.lins:
        layer.model[1].weight.data = torch.rand_like(layer.model[1].weight)
    classifier = {"classifier.0.weight": torch.zeros(1)}
    torch.save({f"features.{n}": v for n, v in backbone.state_dict().items()} | classifier, folder / "vgg16.pth")
    torch.save(
        {f"lin{i}.model.1.weight": layer.model[1].weight.data for i, layer in enumerate(theirs.lins)},
        folder / "vgg.pth",
    )
    return str(folder / "vgg16.pth"), str(folder / "vgg.pth"), theirs


@pytest.mark.process
def test_lpips_parity_with_torchmetrics(lpips_files):
    backbone, linear, theirs = lpips_files
    ours = LPIPS(backbone, linear)
    a, b = torch.rand(2, 2, 3, 32, 40, generator=torch.Generator().manual_seed(1)) * 2 - 1
    expected = theirs(a, b).flatten()
    torch.testing.assert_close(ours.distances(a, b), expected, rtol=1e-4, atol=1e-6)
    assert expected.min() > 1e-4
    b.requires_grad_()
    ours(b, a).backward()
    assert b.grad.abs().sum() > 0 and all(p.grad is None for p in ours.parameters())


@pytest.mark.process
def test_bad_perceptual_settings_are_named(lpips_files, tmp_path):
    with pytest.raises(ValueError, match="perceptual: 'vgg' is unknown"):
        build_perceptual("vgg", [])
    with pytest.raises(ValueError, match="'lpips' needs two files"):
        build_perceptual("lpips", [])
    with pytest.raises(ValueError, match="does not fit Sequential"):
        LPIPS(lpips_files[1], lpips_files[1])
    with pytest.raises(ValueError, match="does not exist"):
        LPIPS(tmp_path / "none.pth", lpips_files[1])
    assert build_perceptual(None, []) is None


def test_hinge_and_adaptive_weight_by_hand():
    real, fake = torch.tensor([2.0, 0.0]), torch.tensor([-3.0, 1.0])
    torch.testing.assert_close(hinge_loss(real, fake), torch.tensor((0.5 + 1.0) / 2))
    last = torch.tensor([3.0, 4.0], requires_grad=True)
    weight = adaptive_weight((last * torch.tensor([6.0, 8.0])).sum(), (last * torch.tensor([3.0, 4.0])).sum(), last)
    torch.testing.assert_close(weight, torch.tensor(10 / (5 + 1e-4)))
    assert adaptive_weight(last.sum() * 1e6, last.sum() * 0, last) == 1e4


@pytest.mark.parametrize(("layers", "shape"), [(2, (14, 14)), (3, (6, 6))])
def test_discriminator_learns_to_tell(layers, shape):
    torch.manual_seed(0)
    discriminator = PatchDiscriminator(channels=8, layers=layers)
    real, fake = torch.ones(4, 3, 64, 64) * 0.5, torch.randn(4, 3, 64, 64)
    assert discriminator(real).shape == (4, 1, *shape)
    optimizer = torch.optim.AdamW(discriminator.parameters(), 1e-3)
    losses = []
    for _ in range(20):
        loss = hinge_loss(discriminator(real), discriminator(fake))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]

"""The image head's loss in parts against the loss from all scores."""

import pytest
import torch
from conftest import inputs_of, tiny_model
from peft import LoraConfig, get_peft_model

import unified.model.image_head
from unified import patch_cross_entropy
from unified.model.image_head import ImageHead, patch_losses
from unified.sequence import ImageSegment, TextSegment, build_sequence

WIDTH, CODES, PATCHES = 8, 20, 13


@pytest.fixture(params=[1, 3, 1000], ids=lambda rows: f"{rows} rows at once")
def rows_at_once(request, monkeypatch):
    monkeypatch.setattr(unified.model.image_head, "_SCORES_AT_ONCE", request.param * CODES)


def inputs(patch_codes, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(PATCHES, WIDTH, generator=generator, dtype=dtype).requires_grad_()
    targets = torch.randint(CODES, (PATCHES, patch_codes), generator=generator)
    targets[:, -1] = targets[:, 0]  # a patch may hold a code more than once
    torch.manual_seed(1)
    return ImageHead(WIDTH, CODES).to(dtype), hidden, targets


def gradients(loss, *tensors):
    return torch.autograd.grad(2.5 * loss, tensors)  # what comes from above is passed on


@pytest.mark.parametrize("patch_codes", [1, 4])
def test_loss_and_gradients_equal_those_from_all_scores(rows_at_once, patch_codes):
    head, hidden, targets = inputs(patch_codes)
    expected = patch_cross_entropy(hidden @ head.weight.T, targets).sum()
    loss = head(hidden, targets)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    for ours, theirs in zip(
        gradients(loss, hidden, head.weight), gradients(expected, hidden, head.weight), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-6)


def test_weights_in_bfloat16(rows_at_once):
    head, hidden, targets = inputs(4, torch.bfloat16)
    expected = patch_cross_entropy(hidden @ head.weight.T, targets).sum()
    loss = head(hidden, targets)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    for ours, theirs in zip(
        gradients(loss, hidden, head.weight), gradients(expected, hidden, head.weight), strict=True
    ):
        assert ours.dtype == torch.bfloat16
        torch.testing.assert_close(ours, theirs, rtol=0.03, atol=0.03)


def test_large_scores_neither_overflow_nor_vanish(rows_at_once):
    head, hidden, targets = inputs(1, torch.float32)
    large = (hidden.detach() * 300).requires_grad_()  # scores of some hundred nats: exp alone would be inf or 0
    expected = torch.nn.functional.cross_entropy(large @ head.weight.T, targets[:, 0], reduction="sum")
    loss = head(large, targets)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    for ours, theirs in zip(gradients(loss, large, head.weight), gradients(expected, large, head.weight), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-4)


def test_a_frozen_head_passes_the_gradient_on(rows_at_once):
    head, hidden, targets = inputs(4)
    expected = gradients(patch_cross_entropy(hidden @ head.weight.T, targets).sum(), hidden)
    head.requires_grad_(False)
    torch.testing.assert_close(gradients(head(hidden, targets), hidden), expected, rtol=0, atol=2e-6)
    with torch.no_grad():
        assert not head(hidden, targets).requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    """Products in half precision, the softmax and the weight's gradient in float32, as without the parts."""
    head, hidden, targets = inputs(4, torch.float32)
    with torch.autocast("cpu", dtype):
        loss, expected = (
            head(hidden, targets),
            patch_cross_entropy(torch.nn.functional.linear(hidden, head.weight), targets),
        )
    torch.testing.assert_close(loss, expected.sum(), rtol=1e-6, atol=0)
    ours, theirs = (gradients(value, hidden, head.weight) for value in (loss, expected.sum()))
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.dtype == torch.float32
        torch.testing.assert_close(mine, other, rtol=0.02, atol=0.02)


def test_an_adapter_on_the_head_counts():
    model = get_peft_model(tiny_model(), LoraConfig(r=2, target_modules=["image_head"], init_lora_weights=False))
    head = model.get_base_model().image_head
    hidden, targets = torch.randn(5, head.in_features), torch.randint(20, (5, 1))
    torch.testing.assert_close(patch_losses(head, hidden, targets), patch_cross_entropy(head(hidden), targets).sum())
    vocabulary = model.get_base_model().config.vocabulary
    image = ImageSegment(torch.zeros(4, 4, dtype=torch.int64))
    model(**inputs_of(model.config, build_sequence([TextSegment([5]), image], vocabulary))).loss.backward()
    assert all(p.grad.abs().sum() > 0 for name, p in model.named_parameters() if "lora" in name)

"""Group relative policy optimisation (GRPO, arXiv 2402.03300) of image codes: the numbers, as functions of tensors.

G images are sampled for each prompt and rewarded. The advantage of an image is its reward less the mean of its prompt's, in
standard deviations; all of its codes share it. The policy follows the clipped ratio of its probabilities to those at sampling
(PPO, arXiv 1707.06347) and pays for its distance to the reference, the model without its adapter.
"""

from typing import NamedTuple

import torch
from peft import PeftModel
from torch import Tensor, nn

SPREAD = 1e-4  # added to a prompt's standard deviation, so that rewards that are all but equal do not count in full


class PolicyLoss(NamedTuple):
    """A loss and what is worth a look beside it, all means over codes.

    Attributes:
        loss: to be minimised.
        kl: estimate of the divergence of the policy from the reference, in nats a code.
        ratio: of the policy's probabilities to those at sampling.
        clipped: share of the codes whose ratio is clipped and so gives no gradient.
    """

    loss: Tensor
    kl: Tensor
    ratio: Tensor
    clipped: Tensor


def group_advantages(rewards: Tensor, group_size: int) -> Tensor:
    """``(N,)``: rewards ``(N,)``, those of a prompt side by side, less their mean, by their standard deviation.

    A prompt whose images are all rewarded alike has advantages of 0.

    Raises:
        ValueError: if there are less than two images a prompt, or N is not a multiple of them.
    """
    if group_size < 2 or len(rewards) % group_size:
        raise ValueError(
            f"group_size: {group_size} for {len(rewards)} rewards; give at least 2, and as many for each prompt."
        )
    groups = rewards.view(-1, group_size)
    centred = groups - groups.mean(dim=1, keepdim=True)
    return (centred / (groups.std(dim=1, keepdim=True) + SPREAD)).flatten()


def k3(log_probs: Tensor, reference: Tensor) -> Tensor:
    """An estimate of KL(policy, reference) for each code that the policy sampled: ``r - 1 - log r`` of ``r = reference / policy``.

    It is never negative, and unbiased for codes of the policy itself (Schulman 2020, the third of three estimators).
    """
    difference = reference - log_probs
    return torch.expm1(difference) - difference


def grpo_loss(
    log_probs: Tensor, sampled: Tensor, reference: Tensor, advantages: Tensor, clip: float, kl_weight: float
) -> PolicyLoss:
    """The loss of codes ``(N, L)`` of N images, a mean over all codes.

    Args:
        log_probs: of the policy as it is, differentiable.
        sampled: of the policy when it sampled the codes.
        reference: of the reference; both are taken without gradients.
        advantages: ``(N,)``.
        clip: a ratio is clipped to ``1 - clip`` ... ``1 + clip`` where it is in the policy's favour.
        kl_weight: of the divergence from the reference.
    """
    ratio = torch.exp(log_probs - sampled.detach())
    gain = advantages.detach()[:, None]
    free, bounded = ratio * gain, ratio.clamp(1 - clip, 1 + clip) * gain
    kl = k3(log_probs, reference.detach())
    loss = (kl_weight * kl - torch.minimum(free, bounded)).mean()
    return PolicyLoss(loss, kl.detach().mean(), ratio.detach().mean(), (bounded < free).detach().float().mean())


def code_diversity(codes: Tensor, group_size: int) -> float:
    """How unlike the images of a prompt are: the share of cells in which two of them differ, ``codes (N, h, w)``; 0 for copies."""
    groups = codes.reshape(-1, group_size, codes.shape[1] * codes.shape[2])
    unlike = (groups[:, :, None] != groups[:, None]).float().mean(dim=3)
    return float(unlike.sum() / (len(groups) * group_size * (group_size - 1)))


def check_policy(model: nn.Module) -> None:
    """Refuse a model without an adapter to train. Raises ValueError."""
    if not isinstance(model, PeftModel) or not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(
            "policy: it has no adapter that is trained, and its reference is the model without one; use attach_lora, or "
            "load_lora with trainable=True."
        )

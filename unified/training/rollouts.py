"""Images that a policy samples to learn from, and how likely it finds them while it learns.

The log-probabilities of a rollout are those of the distribution that its codes were sampled from: guided and divided by the
temperature, as images are sampled later. The training forward pass gives the same numbers in one pass over whole sequences,
with gradients through the conditional and the unconditional side. What is trained without guidance need not show with it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from unified.config import UnifiedConfig
from unified.data.batches import make_batch
from unified.decoding import Prompt, Sampling, make_decoder
from unified.decoding.decode import generate_scored
from unified.decoding.passes import order_seed
from unified.decoding.sampling import guide
from unified.lora.base import base_of
from unified.model.image_head import code_log_probs
from unified.prediction.arrange import cell_codes
from unified.prediction.merge import Grid, merged_grid
from unified.prediction.plan import Prediction
from unified.sequence import ImageSegment, TextSegment, TokenSequence, build_sequence


@dataclass(frozen=True)
class Rollout:
    """B sampled images.

    Attributes:
        rows, negatives: a prompt and its unconditional side for each.
        seeds: of their generators.
        sampling: how they were sampled.
        codes: ``(B, h, w)``.
        log_probs: ``(B, h, w)``, of the codes under the distribution that they were sampled from.
    """

    rows: list[Prompt]
    negatives: list[Prompt]
    seeds: list[int]
    sampling: Sampling
    codes: Tensor
    log_probs: Tensor

    def part(self, start: int, stop: int) -> "Rollout":
        """Images ``[start, stop)``."""
        some = slice(start, stop)
        return Rollout(
            self.rows[some],
            self.negatives[some],
            self.seeds[some],
            self.sampling,
            self.codes[some],
            self.log_probs[some],
        )


def check_rollout(config: UnifiedConfig, sampling: Sampling) -> None:
    """Refuse ways of sampling, or models, whose log-probabilities cannot be followed.

    Raises:
        ValueError: for top-k or top-p, a schedule that is out of range, or a model without prompts.
    """
    for name, off in (("top_k", 0), ("top_p", 1)):
        if getattr(sampling, name) != off:
            raise ValueError(
                f"{name}: {getattr(sampling, name)} cuts off codes, and other ones once the weights have changed, so that a code "
                f"may be impossible later; leave it out of rollouts ({name}={off}), and use temperature or guidance_scale."
            )
    if config.conditioning is not None:
        raise ValueError("pipeline: a model of classes reads no prompts; rollouts need a model that reads text.")


@torch.no_grad()
def sample_rollout(
    policy: nn.Module,
    rows: Sequence[Prompt],
    negatives: Sequence[Prompt],
    grid: Grid,
    sampling: Sampling,
    seeds: Sequence[int],
    batch_size: int = 64,
) -> Rollout:
    """Sample an image for each row, ``batch_size`` at a time; each depends on its row and its seed alone.

    Args:
        policy: a unified model, perhaps with adapters, which are used as they are set. Its mode stays.
        rows, negatives: a prompt and its unconditional side for each image.
        grid: code grid ``(h, w)``.
        sampling: without top-k and top-p.
        seeds: one for each image.
        batch_size: images at once.

    Raises:
        ValueError: as :func:`check_rollout`, or if lists differ in length.
    """
    model = base_of(policy)  # type: ignore[arg-type]
    check_rollout(model.config, sampling)
    training = policy.training
    policy.eval()
    try:
        decoder, parts = make_decoder(model), []
        for start in range(0, len(rows), batch_size):
            some = slice(start, start + batch_size)
            own = [torch.Generator().manual_seed(seed) for seed in seeds[some]]
            parts.append(generate_scored(decoder, rows[some], negatives[some], grid, sampling, own))
    finally:
        policy.train(training)
    # Copies, because what inference mode has made takes part in no backward pass.
    codes, log_probs = (torch.cat(each).clone() for each in zip(*parts, strict=True))
    return Rollout(list(rows), list(negatives), list(seeds), sampling, codes, log_probs)


class Arranged:
    """A rollout as a batch for training, on a device: :meth:`log_probs` under whatever the weights are by now.

    Args:
        rollout: of a model.
        config: of that model.
        device: where the model is.
    """

    def __init__(self, rollout: Rollout, config: UnifiedConfig, device: torch.device):
        self.sampling, self.images = rollout.sampling, len(rollout.codes)
        prediction, grid = Prediction.of(config), (rollout.codes.shape[1], rollout.codes.shape[2])
        sides = [rollout.rows, rollout.negatives] if self.sampling.guided else [rollout.rows]
        orders = [order_seed(torch.Generator().manual_seed(seed)) for seed in rollout.seeds]
        sequences = [
            _sequence(row, codes, seed, config)
            for side in sides
            for row, codes, seed in zip(side, rollout.codes.cpu(), orders, strict=True)
        ]
        inputs = make_batch(sequences, config, as_sampled=True).inputs
        self.inputs: dict[str, Any] = {n: v.to(device) if isinstance(v, Tensor) else v for n, v in inputs.items()}
        targets = [_targets(prediction, grid, seed, self.sampling) for seed in orders]
        numbers, scales, temperatures = zip(*targets, strict=True)
        self._numbers = torch.stack(numbers).to(device)  # (B, n, P)
        self._scales = torch.stack(scales).to(device)  # (B, n)
        self._temperatures = torch.stack(temperatures).to(device)  # (B, n)
        self._codes = rollout.codes.flatten(1).to(device)

    def log_probs(self, policy: nn.Module) -> Tensor:
        """``(B, h*w)``, of the codes of each image, row by row; differentiable."""
        states = policy(**self.inputs, return_image_states=True).image_states  # (R * n, P, D)
        if self.sampling.guided:
            conditional, unconditional = states.chunk(2)
            states = guide(conditional, unconditional, self._scales.flatten()[:, None, None])
        # The head is linear and has no bias: states divided by the temperature give logits divided by it.
        states, index = states / self._temperatures.flatten()[:, None, None], self._numbers.flatten(1)
        codes = self._codes.gather(1, index)
        head = base_of(policy).image_head  # type: ignore[arg-type]
        found = code_log_probs(head, states.flatten(0, 1), codes.reshape(-1, 1)).view_as(codes)
        return torch.zeros_like(found).scatter(1, index, found)


def _sequence(row: Prompt, codes: Tensor, order: int, config: UnifiedConfig) -> TokenSequence:
    """``<bos> text <boi> codes <eoi>``, the codes alone in the loss, in the order in which they were sampled."""
    start = [] if config.vocabulary.bos_token_id is None else [config.vocabulary.bos_token_id]
    text = TextSegment(row.ids[len(start) : -1], loss=False)
    made = build_sequence([text, ImageSegment(codes)], config.vocabulary)
    made.seed = [order]
    return made


def _targets(prediction: Prediction, grid: Grid, order: int, sampling: Sampling) -> tuple[Tensor, Tensor, Tensor]:
    """Of one image, in the order of its targets: the codes ``(n, P)`` of each cell, its guidance scale and temperature ``(n,)``."""
    side = prediction.merge.side
    plan = prediction.plan(merged_grid(grid, side), order if prediction.way.any_order else None)
    index, scales = cell_codes(grid, side), sampling.scales(grid[0] * grid[1])
    entering = np.flatnonzero(plan.cells >= 0)
    _, first = np.unique(plan.cells[entering], return_index=True)  # where each cell enters first
    cells = plan.cells[entering[np.sort(first)]]
    begins = np.array([plan.ranks[plan.groups == group].min() for group in range(plan.groups.max() + 1)]) * side**2
    groups = plan.groups[cells]
    temperatures = [sampling.among(int((plan.groups == group).sum())).temperature for group in groups]
    return (
        torch.from_numpy(index[cells]),
        torch.tensor([scales[begins[group]] for group in groups]),
        torch.tensor(temperatures),
    )

"""Condition Contrastive Alignment (arXiv 2410.09347): what guidance does in sampling, trained into an adapter."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F

from unified.config import UnifiedConfig
from unified.prediction.arrange import Batch, image_spans
from unified.sequence import IGNORE, TokenSequence
from unified.settings import check_range
from unified.training.objectives.base import MicroBatch, Objective, Term, unsupervised
from unified.training.objectives.log_probs import log_ratios, pairs_of


@dataclass
class CCA(Objective):
    """Images are made likelier after their own condition, and less likely after those of others.

    For an image x, its caption or class c, and c' of another image of the micro-batch:

        L = -log s(beta r(x, c)) - lambda log s(-beta r(x, c')),     r(x, c) = log p(x | c) - log p_ref(x | c)

    with the logistic function s, and the model without its adapter as p_ref. As in the authors' code (thu-ml/CCA, MIT), the sum
    is divided by max(lambda, 1). The optimum is r(x, c) = (log p(x | c) / p(x) - log lambda) / beta: what guidance at scale
    1 + 1 / beta does. The paper's beta of 0.02 is for one epoch of a fine-tune, which ends far from it.

    Conditions are shuffled among the images of a micro-batch so that none keeps its own or an equal one; images for which that is
    not possible, without a caption (``caption_dropout``) or beside others in one sequence are left out. The adapter is saved with
    guidance switched off.
    """

    beta: float = 0.02  # about 1 / (guidance scale - 1) for a run that converges; smaller for a short one
    negative_weight: float = 1000.0  # lambda: more favours agreement over variety, as a greater guidance scale does

    name: ClassVar[str] = "cca"
    needs_adapter: ClassVar[bool] = True
    asks: ClassVar[dict[str, Any] | None] = {"return_log_probs": True}
    sampling: ClassVar[dict[str, Any]] = {"guidance_scale": 1.0}

    def check(self, config: Any) -> None:
        """Raises ValueError for a setting that is out of range, or batches of one image."""
        super().check(config)
        check_range(self.prefix, self, "(0, inf)", "beta", "negative_weight")
        if config.batch_size < 2:
            raise ValueError("batch_size: 1 leaves objectives.cca no other condition; take more rows a micro-batch.")

    def further(
        self, sequences: Sequence[TokenSequence], rng: np.random.Generator, config: UnifiedConfig
    ) -> list[TokenSequence]:
        """Every image after the condition of another one; unsupervised where there is no pair."""
        conditions = [condition_of(sequence, config) for sequence in sequences]
        partners = mismatched(conditions, rng)
        return [
            unsupervised(sequence) if partner is None else _after(sequence, sequences[partner], config)
            for sequence, partner in zip(sequences, partners, strict=True)
        ]

    def count(self, batch: Batch) -> float:
        """Images that have a pair."""
        negatives = batch.further[self.name]
        return float(pairs_of(negatives, negatives.inputs).sum())

    def loss(self, given: MicroBatch, items: float) -> Term:
        """The loss of all pairs, with the share that the model tells apart and the distance of their ratios."""
        positive, negative, pairs = log_ratios(given, self.name)
        losses = -F.logsigmoid(self.beta * positive) - self.negative_weight * F.logsigmoid(-self.beta * negative)
        metrics = {"accuracy": ((positive > negative) * pairs).sum(), "margin": ((positive - negative) * pairs).sum()}
        return Term((losses * pairs).sum() / max(self.negative_weight, 1.0) / items, metrics)


def condition_of(sequence: TokenSequence, config: UnifiedConfig) -> Hashable | None:
    """What the only image of a sequence is conditioned on: the ids before its ``<boi>``, or its class.

    None without a condition, without an image in the loss, and for several images or one that is read.
    """
    if len(sequence.image_grids) != 1 or sequence.features:
        return None
    ids, start = sequence.input_ids.numpy(), _start(sequence, config)
    height, width = sequence.image_grids[0]
    if (sequence.labels[start : start + height * width] == IGNORE).all():
        return None
    if sequence.condition is not None:
        return None if sequence.condition == config.classes else sequence.condition
    caption = tuple(ids[: start - 1].tolist())
    return None if caption in ((), (config.vocabulary.bos_token_id,)) else caption


def mismatched(conditions: Sequence[Hashable | None], rng: np.random.Generator) -> list[int | None]:
    """For each condition the number of a different one, chosen at random, or None; none is taken twice.

    Equal conditions stand together in a random order of all; each takes what lies as far behind it as the most frequent one
    is frequent. So all of them find a partner as long as no condition has more than half of them.
    """
    groups: dict[Hashable, list[int]] = {}
    for number in rng.permutation(len(conditions)).tolist():
        if conditions[number] is not None:
            groups.setdefault(conditions[number], []).append(number)
    order = [number for members in groups.values() for number in members]
    partners: list[int | None] = [None] * len(conditions)
    step = max(map(len, groups.values()), default=0)
    for place, number in enumerate(order):
        partner = order[(place + step) % len(order)]
        if conditions[partner] != conditions[number]:
            partners[number] = partner
    return partners


def _start(sequence: TokenSequence, config: UnifiedConfig) -> int:
    """Where the codes of the only image begin."""
    return image_spans(sequence.input_ids.numpy(), sequence.image_grids, config.vocabulary)[0][0]


def _after(sequence: TokenSequence, other: TokenSequence, config: UnifiedConfig) -> TokenSequence:
    """The image of a sequence after the condition of another one."""
    if sequence.condition is not None:
        return replace(sequence, condition=other.condition)
    own, theirs = _start(sequence, config) - 1, _start(other, config) - 1
    labels = torch.cat([torch.full((theirs,), IGNORE), sequence.labels[own:]])
    return replace(sequence, input_ids=torch.cat([other.input_ids[:theirs], sequence.input_ids[own:]]), labels=labels)

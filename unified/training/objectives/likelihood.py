"""Likelihood: the cross-entropy of codes and text, as the model itself computes it."""

from dataclasses import dataclass
from typing import Any, ClassVar

from unified.prediction.arrange import Batch
from unified.training.objectives.base import MicroBatch, Objective, Term


@dataclass
class Likelihood(Objective):
    """``-log p`` of the supervised text ids and codes; of the codes of a patch, their mean (arXiv 2412.15321)."""

    name: ClassVar[str] = "likelihood"
    asks: ClassVar[dict[str, Any] | None] = {}

    def count(self, batch: Batch) -> float:
        """The weight of the supervised positions."""
        return batch.counts.weight

    def loss(self, given: MicroBatch, items: float) -> Term:
        """The model's own loss, which is divided by ``items`` already."""
        assert given.output is not None and given.output.loss is not None
        return Term(given.output.loss, {})

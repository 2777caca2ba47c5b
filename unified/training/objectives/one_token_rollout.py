"""One-token rollout (OTR, arXiv 2509.26313): fine-tuning as policy gradient of single codes."""

from dataclasses import dataclass
from typing import Any, ClassVar

from unified.prediction.arrange import Batch
from unified.sequence import IGNORE
from unified.training.objectives.base import MicroBatch, Objective, Term
from unified.training.objectives.log_probs import target_labels


@dataclass
class OneTokenRollout(Objective):
    """Codes are sampled at every position, and rewarded with 1 where they are the label and with b elsewhere:

        L = -1/K sum_k r(a_k) log p(a_k),     a_k sampled from p,     r(a) = 1 if a is the label y, else b

    Its gradient has an expectation in closed form, which is what is followed here, as with infinitely many samples and without
    their noise. Since sum_a p(a) grad log p(a) = 0, a reward that all codes share has no effect, and what is left is

        E[grad L] = -(1 - b) p(y) grad log p(y)

    so that a label counts as much as the model expects it already, and (1 - b) is a matter of ``weight``. Image codes only: text
    and ``<eoi>`` need likelihood beside it. The codes of a patch are labels of its one distribution, with their mean.
    """

    name: ClassVar[str] = "otr"
    asks: ClassVar[dict[str, Any] | None] = {"return_log_probs": True}

    def count(self, batch: Batch) -> float:
        """Supervised positions of images."""
        return float(batch.counts.image_targets)

    def loss(self, given: MicroBatch, items: float) -> Term:
        """The loss of all supervised cells, with the mean probability of a label."""
        assert given.output is not None and given.output.log_probs is not None
        log_probs = given.output.log_probs
        used = target_labels(given.inputs) != IGNORE
        share = used / used.sum(dim=1, keepdim=True).clamp_min(1)
        probability = log_probs.detach().exp()
        return Term(-(probability * log_probs * share).sum() / items, {"probability": (probability * share).sum()})

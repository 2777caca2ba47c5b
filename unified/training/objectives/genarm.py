"""Autoregressive reward models (GenARM, arXiv 2410.08193): an adapter whose log-probabilities are rewards, code by code."""

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from accelerate.utils import send_to_device

from unified.settings import check_range
from unified.training.objectives.base import MicroBatch, Term
from unified.training.objectives.dpo import DPO
from unified.training.objectives.log_probs import log_probs_of, pairs_of, per_sequence


@dataclass
class GenARM(DPO):
    """The reward of an image is its log-probability under the adapter, and the preferred image w shall have the higher one:

        L = -log s(beta (log p(w | c) - log p(l | c)) - gamma)

    with the logistic function s and log-probabilities summed over the codes of an image. Unlike in direct preference optimisation
    there is no reference: the adapter is no policy, but steers one (:func:`unified.decoding.steering.steer`).
    """

    beta: float = 0.05
    gamma: float = 0.0  # by how much the preferred image shall be ahead, in units of the logistic function

    name: ClassVar[str] = "genarm"

    def check(self, config: object) -> None:
        """Raises ValueError for a setting that is out of range, or data without pairs."""
        super().check(config)
        check_range(self.prefix, self, "[0, inf)", "gamma")

    def loss(self, given: MicroBatch, items: float) -> Term:
        """The loss of all pairs, with the share in which the preferred image has the higher reward, and by how much."""
        assert given.output is not None and given.output.log_probs is not None
        further = given.batch.further[self.name]
        inputs = send_to_device(further.inputs, given.inputs["labels"].device)
        chosen = per_sequence(given.output.log_probs, given.batch, given.inputs)
        rejected = per_sequence(log_probs_of(given.model, inputs), further, inputs)
        pairs, margin = pairs_of(further, inputs), chosen - rejected
        losses = -F.logsigmoid(self.beta * margin - self.gamma)
        metrics = {"accuracy": ((margin > 0) * pairs).sum(), "margin": (margin * pairs).sum()}
        return Term((losses * pairs).sum() / items, metrics)

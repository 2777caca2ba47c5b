"""Direct preference optimisation (arXiv 2305.18290): pairs of images, of which one is preferred, into an adapter."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch.nn.functional as F

from unified.config import UnifiedConfig
from unified.prediction.arrange import Batch
from unified.sequence import TokenSequence
from unified.settings import check_range
from unified.training.objectives.base import MicroBatch, Objective, Term, unsupervised
from unified.training.objectives.log_probs import log_ratios, pairs_of


@dataclass
class DPO(Objective):
    """The preferred image w of a caption c gains on the other one l (equation 7):

        L = -log s(beta (r(w, c) - r(l, c))),     r(x, c) = log p(x | c) - log p_ref(x | c)

    with the logistic function s, log-probabilities summed over the codes of an image, and the model without its adapter as p_ref.
    Rows of sources of kind ``pairs`` count; likelihood beside it trains on the preferred images.
    """

    beta: float = 0.1  # how far the model may move from its reference: less for more

    name: ClassVar[str] = "dpo"
    needs_adapter: ClassVar[bool] = True
    asks: ClassVar[dict[str, Any] | None] = {"return_log_probs": True}

    def check(self, config: Any) -> None:
        """Raises ValueError for a setting that is out of range, or data without pairs."""
        super().check(config)
        check_range(self.prefix, self, "(0, inf)", "beta")
        if not any(source.kind == "pairs" for source in config.data.sources):
            raise ValueError(
                f"objectives: {self.name} needs pairs; name them as data.sources=[{{path: pairs.jsonl, kind: pairs}}], with the "
                "columns chosen, rejected and caption."
            )

    def further(
        self, sequences: Sequence[TokenSequence], rng: np.random.Generator, config: UnifiedConfig
    ) -> list[TokenSequence]:
        """The other image of every pair, in the permutation of the preferred one."""
        return [
            unsupervised(sequence) if sequence.rejected is None else replace(sequence.rejected, seed=sequence.seed)
            for sequence in sequences
        ]

    def count(self, batch: Batch) -> float:
        """Pairs."""
        rejected = batch.further[self.name]
        return float(pairs_of(rejected, rejected.inputs).sum())

    def loss(self, given: MicroBatch, items: float) -> Term:
        """The loss of all pairs, with the share in which the preferred image gains more, and by how much."""
        chosen, rejected, pairs = log_ratios(given, self.name)
        losses = -F.logsigmoid(self.beta * (chosen - rejected))
        metrics = {"accuracy": ((chosen > rejected) * pairs).sum(), "margin": ((chosen - rejected) * pairs).sum()}
        return Term((losses * pairs).sum() / items, metrics)

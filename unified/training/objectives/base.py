"""What an objective is: the protocol between a loss and the training step that sums several of them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from unified.config import UnifiedConfig
from unified.model.output import UnifiedOutput
from unified.prediction.arrange import Batch
from unified.sequence import IGNORE, TokenSequence
from unified.settings import check_range


class MicroBatch(NamedTuple):
    """Inputs of an objective's loss for one micro-batch.

    Attributes:
        model: the trained model, as Accelerate has wrapped it; call it with the inputs of any batch.
        batch: as the data layer made it, on the CPU; ``batch.further[name]`` is arranged from :meth:`Objective.further`.
        inputs: its inputs on the device.
        output: of the model's forward pass over it; None if no objective of the run has ``asks``.
        number: of the micro-batch among those of this process, from the start of the run.
    """

    model: nn.Module
    batch: Batch
    inputs: dict[str, Any]
    output: UnifiedOutput | None
    number: int = 0


class Term(NamedTuple):
    """A loss, divided by the ``items`` of its objective, and further metrics for the log, each summed over these items."""

    loss: Tensor
    metrics: dict[str, Tensor]


@dataclass
class Objective:
    """A loss of the training step. Its fields are its settings: the keys of an entry of ``objectives``.

    Write a subclass in a file of this folder and add it to :data:`unified.training.objectives.table.OBJECTIVES`.

    Attributes:
        name: in settings and logs.
        needs_adapter: whether the model without its adapter is its reference.
        asks: keyword arguments that it adds to the forward pass over the batch, whose output it reads; None if it does not
            read that.
        sampling: defaults of sampling that the trained adapter is saved with.
        module: its own parameters, which train with the model and are not saved with it; :meth:`build` makes them.
    """

    weight: float = 1.0  # of its loss in the sum

    name: ClassVar[str]
    needs_adapter: ClassVar[bool] = False
    asks: ClassVar[dict[str, Any] | None] = None
    sampling: ClassVar[dict[str, Any]] = {}
    module = None  # type: nn.Module | None

    @property
    def prefix(self) -> str:
        """What stands before a setting's name in errors."""
        return f"objectives.{self.name}."

    def check(self, config: Any) -> None:
        """Raises ValueError for a setting that is out of range, or contradicts one of the run's ``TrainConfig``."""
        check_range(self.prefix, self, "(0, inf)", "weight")

    def build(self, model: nn.Module, image_tokenizer: Any) -> nn.Module | None:
        """Its own parameters, for a model that is not wrapped yet; None without any.

        Raises:
            ValueError: if model or tokenizer lack what the objective needs.
        """
        return None

    def further(
        self, sequences: Sequence[TokenSequence], rng: np.random.Generator, config: UnifiedConfig
    ) -> list[TokenSequence] | None:
        """Further sequences for a micro-batch, one for each sequence of the batch, arranged as those are; None for none.

        Called in the data layer, perhaps in another process; ``config`` is that of the model. What does not count has labels
        of -100.
        """
        return None

    def count(self, batch: Batch) -> float:
        """How many items of this micro-batch its loss is a mean over; the counts of micro-batches and processes add up."""
        raise NotImplementedError

    def loss(self, given: MicroBatch, items: float) -> Term:
        """The sum of the losses of its items, divided by ``items``: the mean count of a micro-batch over the whole step.

        Gradients are averaged over micro-batches and processes, so that the step follows the mean over all of its items.
        """
        raise NotImplementedError


def unsupervised(sequence: TokenSequence) -> TokenSequence:
    """A sequence with nothing in the loss, for the place of a further one that does not count."""
    return replace(sequence, labels=torch.full_like(sequence.labels, IGNORE))

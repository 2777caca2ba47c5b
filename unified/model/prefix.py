"""Conditions that are no text: a class, or features of another network, as the first positions of a sequence.

A conditioned sequence reads ``<pad> ... <pad> <boi> codes <eoi>``. The output of a condition module replaces the first
``length`` embeddings, of which ``<boi>`` is the last; that position predicts the first code. A model with a condition reads
no text: its text vocabulary holds what frames an image, and nothing else.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unified.config import CONDITION_SIZES, Vocabulary, check_conditioning
from unified.sequence import TextSegment

BOI, EOI = 1, 2  # of a model without text
NO_TEXT: dict[str, Any] = {"vocab_size": 3, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": None}


class ClassCondition(nn.Module):
    """One position for a class; class ``classes`` is the unconditional one."""

    length = 1

    def __init__(self, width: int, classes: int):
        super().__init__()
        self.classes = classes
        self.table = nn.Embedding(classes + 1, width)

    def forward(self, labels: Tensor) -> Tensor:
        """``(B,)`` int64 in [0, classes] to ``(B, 1, D)``.

        Raises:
            ValueError: for another shape or type, and on a CPU for other numbers, which a GPU is not asked for.
        """
        if labels.ndim != 1 or labels.is_floating_point():
            raise self._refusal(labels)
        try:
            return self.table(labels)[:, None]
        except IndexError as error:
            raise self._refusal(labels) from error

    def _refusal(self, labels: Tensor) -> ValueError:
        return ValueError(
            f"condition: need class numbers (B,) in [0, {self.classes}] ({self.classes} is unconditional), got "
            f"{labels.dtype} {tuple(labels.shape)}."
        )

    def unconditional(self, batch_size: int) -> Tensor:
        """The condition that guidance steers away from."""
        return torch.full((batch_size,), self.classes, device=self.table.weight.device)


class FeatureCondition(nn.Module):
    """``length`` positions for as many feature vectors, such as those of Flan-T5, projected by a small network."""

    def __init__(self, width: int, length: int, features: int):
        super().__init__()
        self.length, self.features = length, features
        self.fc1 = nn.Linear(features, width, bias=False)
        self.fc2 = nn.Linear(width, width, bias=False)
        self.register_buffer("nothing", torch.zeros(length, features))

    def forward(self, features: Tensor) -> Tensor:
        """``(B, length, features)`` to ``(B, length, D)``. Raises ValueError on another shape."""
        if features.ndim != 3 or features.shape[1:] != (self.length, self.features):
            raise ValueError(
                f"condition: need features (B, {self.length}, {self.features}), got {tuple(features.shape)}; pad short captions "
                "on the left and mask the padding."
            )
        return self.fc2(F.gelu(self.fc1(features.to(self.fc1.weight.dtype)), approximate="tanh"))

    def unconditional(self, batch_size: int) -> Tensor:
        """The condition that guidance steers away from."""
        return self.nothing.expand(batch_size, -1, -1)  # type: ignore[operator]


def build_condition(description: dict[str, Any], width: int) -> ClassCondition | FeatureCondition:
    """Build the module that ``UnifiedConfig.conditioning`` describes, for embeddings of ``width`` numbers.

    Raises:
        ValueError: if ``kind`` is unknown, or a size is missing or no size.
    """
    modules: dict[str, Callable[..., ClassCondition | FeatureCondition]] = {
        "class": ClassCondition,
        "features": FeatureCondition,
    }
    check_conditioning(description)
    kind = description["kind"]
    return modules[kind](width, **{name: description[name] for name in CONDITION_SIZES[kind]})


def condition_positions(length: int, vocabulary: Vocabulary) -> TextSegment:
    """Padding in front of an image segment that a condition of ``length`` positions replaces, ``<boi>`` being its last one."""
    return TextSegment([vocabulary.pad_token_id] * (length - 1), loss=False)

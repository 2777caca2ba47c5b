"""reAR (arXiv 2510.04450): hidden states that know the vectors of the codes, so that what is generated suits the tokenizer."""

from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unified.lora.base import base_of
from unified.model.modeling import UnifiedForCausalLM
from unified.prediction.arrange import Batch
from unified.sequence import IGNORE
from unified.settings import check_range
from unified.training.objectives.base import MicroBatch, Objective, Term
from unified.training.objectives.hidden import states_at
from unified.training.objectives.log_probs import target_labels


@dataclass
class ReAR(Objective):
    """Two small networks read the vector of a code from the hidden states of the model:

        L = 1 - cos(f(h_l(x_i)), e(x_i)) + 1 - cos(g(h_m(s_i)), e(x_i))

    where h_l(x_i) is the state, after the first layers, of the position that code i enters, h_m(s_i) that, after most layers, of
    the position that predicts code i (the mean of several), and e the code vectors of the image tokenizer, for a window of codes
    their mean. ``data.code_noise`` makes the context noisy, at a rate that is sampled for each image as in the paper; the targets
    are the true codes. Layers and networks are those of the authors' configurations (QY-H00/reAR), but their rate of noise falls
    over the training and this one stays; the cosine is this project's choice. The networks are not saved with the model.
    """

    current_layer: int = 1  # l: layers before the state that knows its own code
    next_layer: int | None = None  # m: layers before the state that knows the next code; default: three quarters of all
    width: int = 2048  # of the two networks

    name: ClassVar[str] = "rear"
    asks: ClassVar[dict[str, Any] | None] = {"output_hidden_states": True}
    vectors = torch.empty(0)  # (K, d), of the image tokenizer
    first_code = 0  # id of code 0

    def check(self, config: Any) -> None:
        """Raises ValueError for a setting that is out of range."""
        super().check(config)
        check_range(self.prefix, self, "[1, inf)", "current_layer", "next_layer", "width")

    def build(self, model: nn.Module, image_tokenizer: Any) -> nn.Module:
        """The two networks.

        Raises:
            ValueError: if the tokenizer has no code vectors, or the model fewer layers.
        """
        vectors = image_tokenizer.codebook_vectors()
        if vectors is None:
            raise ValueError(
                f"objectives: rear needs code vectors, and {type(image_tokenizer).__name__} has none; use one with a codebook."
            )
        text = base_of(cast(UnifiedForCausalLM, model)).config.text_config
        depth = text.num_hidden_layers
        self.next_layer = self.next_layer or max(1, depth * 3 // 4)
        for name in ("current_layer", "next_layer"):
            if getattr(self, name) > depth:
                raise ValueError(
                    f"{self.prefix}{name}: {getattr(self, name)} is beyond the {depth} layers of the model."
                )
        self.vectors, self.first_code = vectors.detach().float(), text.vocab_size
        return Readers(text.hidden_size, self.width, vectors.shape[1])

    def count(self, batch: Batch) -> float:
        """Supervised positions of images."""
        return float(batch.counts.image_targets)

    def loss(self, given: MicroBatch, items: float) -> Term:
        """The distances of all supervised cells, with the two parts."""
        assert given.output is not None and given.output.hidden_states is not None and self.module is not None
        assert self.next_layer is not None
        inputs, states = given.inputs, given.output.hidden_states
        targets = inputs["image_targets"]
        labels = target_labels(inputs)
        sources = inputs["image_sources"] if "image_sources" in inputs else (targets - 1)[:, None]
        own, there = states_at(states[self.current_layer], targets[:, None], inputs)
        before, _ = states_at(states[self.next_layer], sources, inputs)
        read, foreseen = self.module(own, before)
        self.vectors = self.vectors.to(read.device)
        used = labels != IGNORE
        codes = torch.where(used, labels - self.first_code, 0)
        wanted = (self.vectors[codes] * used[..., None]).sum(dim=1) / used.sum(dim=1, keepdim=True).clamp_min(1)
        supervised = used.any(dim=1).float()
        parts = {
            "current": ((1 - F.cosine_similarity(read.float(), wanted)) * supervised * there).sum(),
            "next": ((1 - F.cosine_similarity(foreseen.float(), wanted)) * supervised).sum(),
        }
        return Term((parts["current"] + parts["next"]) / items, {name: part.detach() for name, part in parts.items()})


class Readers(nn.Module):
    """Two networks of three layers, from states ``(N, D)`` of the current and the next code to code vectors ``(N, d)``."""

    def __init__(self, hidden: int, width: int, dim: int):
        super().__init__()
        self.current, self.next = (
            nn.Sequential(
                nn.Linear(hidden, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, dim)
            )
            for _ in range(2)
        )

    def forward(self, current: Tensor, following: Tensor) -> tuple[Tensor, Tensor]:
        """Vectors of the codes that entered, and of those to come."""
        return self.current(current), self.next(following)

"""ARRA (arXiv 2503.07334): hidden states of codes aligned with the features of a frozen vision encoder."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from omegaconf import MISSING
from torch import Tensor, nn

from unified.lora.base import base_of
from unified.model.modeling import UnifiedForCausalLM
from unified.model.vision import feature_map, load_vision_model
from unified.prediction.arrange import Batch
from unified.prediction.merge import windows
from unified.sequence import IGNORE
from unified.settings import check_range
from unified.training.objectives.base import MicroBatch, Objective, Term
from unified.training.objectives.hidden import states_at
from unified.training.objectives.log_probs import image_of_targets, target_labels


@dataclass
class ARRA(Objective):
    """A small network reads, from the state of every code after some layers, what a vision encoder sees at its place:

        L = 1 - cos(f(h_l(x_i)), v_i)

    v_i is the encoder's feature map of the image, scaled to the grid of codes; for a window of codes its mean over the window, so
    that coarse stages have the same targets. The image is what the tokenizer decodes from the true codes, so any codes will do,
    whatever crops and flips they are of; decoder and encoder run in every step. Raster order; cells are not permuted here. The
    paper's other form, which puts one token for the whole image behind the text, is not here. The network is not saved.
    """

    encoder: str = (
        MISSING  # folder of a vision model of transformers with its preprocessor_config.json, such as DINOv2 or CLIP's
    )
    layer: int = 1  # l; the authors' code (xiexing0916/ARRA) aligns the states after the first layer
    width: int = 2048  # of the network

    name: ClassVar[str] = "arra"
    asks: ClassVar[dict[str, Any] | None] = {"output_hidden_states": True}
    eye = cast(Any, None)
    first_code = 0  # id of code 0

    def check(self, config: Any) -> None:
        """Raises ValueError for a setting that is missing or out of range, or another order of codes."""
        super().check(config)
        check_range(self.prefix, self, "[1, inf)", "layer", "width")
        if not (Path(self.encoder) / "config.json").is_file():
            raise ValueError(
                f"objectives.arra.encoder: {self.encoder!r} is no folder of a vision model of transformers; give one with a "
                "config.json."
            )

    def build(self, model: nn.Module, image_tokenizer: Any) -> nn.Module:
        """The network, and the encoder beside it.

        Raises:
            ValueError: if the model has fewer layers or another order of codes, or the folder holds no vision model.
        """
        base = base_of(cast(UnifiedForCausalLM, model))
        text = base.config.text_config
        if self.layer > text.num_hidden_layers:
            raise ValueError(
                f"{self.prefix}layer: {self.layer} is beyond the {text.num_hidden_layers} layers of the model."
            )
        if not base.prediction.is_raster:
            raise ValueError(f"objectives: arra needs codes in raster order, the model has {base.prediction.order!r}.")
        self.eye, self.first_code = Eye(self.encoder, image_tokenizer), text.vocab_size
        return nn.Sequential(
            nn.Linear(text.hidden_size, self.width), nn.SiLU(), nn.Linear(self.width, self.width), nn.SiLU(),
            nn.Linear(self.width, self.eye.features),
        )  # fmt: skip

    def count(self, batch: Batch) -> float:
        """Supervised positions of images."""
        return float(batch.counts.image_targets)

    def loss(self, given: MicroBatch, items: float) -> Term:
        """The distances of all supervised cells."""
        assert given.output is not None and given.output.hidden_states is not None and self.module is not None
        own, there = states_at(
            given.output.hidden_states[self.layer], given.inputs["image_targets"][:, None], given.inputs
        )
        wanted, known = self.targets(given.batch, own.device)
        similar = F.cosine_similarity(self.module(own).float(), wanted)
        return Term(((1 - similar) * known * there).sum() / items, {"cosine": (similar.detach() * known * there).sum()})

    @torch.no_grad()
    def targets(self, batch: Batch, device: torch.device) -> tuple[Tensor, Tensor]:
        """Features ``(N, F)`` at the cell of each image target, and 1 ``(N,)`` where the whole image is in the loss."""
        labels, number = target_labels(batch.inputs), image_of_targets(batch.inputs)
        side = round(labels.shape[1] ** 0.5)
        wanted, known = (
            torch.zeros(len(labels), self.eye.features, device=device),
            torch.zeros(len(labels), device=device),
        )
        for grid in sorted(set(map(tuple, batch.grids.tolist()))):
            members, places = [], []
            for image in (batch.grids == torch.tensor(grid)).all(dim=1).nonzero().flatten().tolist():
                place = ((number == image) & (labels != IGNORE).all(dim=1)).nonzero().flatten()
                if len(place) == grid[0] * grid[1] // side**2:
                    cells = (labels[place] - self.first_code).view(grid[0] // side, grid[1] // side, side, side)
                    members.append(cells.transpose(1, 2).reshape(grid))
                    places.append(place)
            if members:
                seen = self.eye(torch.stack(members).to(device))  # (n, F, h, w)
                pooled = windows(seen.flatten(2).transpose(1, 2), grid, side).mean(dim=2)
                wanted[torch.cat(places).to(device)] = pooled.flatten(0, 1)
                known[torch.cat(places).to(device)] = 1.0
        return wanted, known


class Eye:
    """What a frozen vision encoder sees in the images of a tokenizer; no parameters of the run."""

    def __init__(self, folder: str, image_tokenizer: Any):
        self.model, processor, self.size = load_vision_model(folder, "objectives.arra.encoder")
        self.tokenizer = image_tokenizer
        self.mean, self.std = (
            torch.tensor(value).view(3, 1, 1) for value in (processor.image_mean, processor.image_std)
        )
        self.features = self._map(torch.zeros(1, 3, *self.size)).shape[1]

    def __call__(self, codes: Tensor) -> Tensor:
        """Features ``(n, F, h, w)`` of the images of codes ``(n, h, w)``."""
        images = (self.tokenizer.decode(codes).float().clamp(-1, 1) + 1) / 2
        images = F.interpolate(images, list(self.size), mode="bilinear", antialias=True, align_corners=False)
        seen = self._map((images - self.mean.to(images)) / self.std.to(images))
        return F.interpolate(seen, list(codes.shape[1:]), mode="bilinear", antialias=True, align_corners=False)

    def _map(self, pixels: Tensor) -> Tensor:
        """The last feature map ``(n, F, g, g)``."""
        self.model.to(pixels.device)
        return feature_map(self.model(pixel_values=pixels).last_hidden_state)

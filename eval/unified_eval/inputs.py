"""The inputs of an evaluation: sets of images of the same captions, the networks, and features on demand."""

from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from PIL import Image

from unified_eval.clip import Clip, check_unique, clip_extractor, clip_recipe, load_clip
from unified_eval.extraction import LazyImage, extract_features
from unified_eval.features import EXTRACTORS, LOGITS_EXTRACTOR, Extractor, load_extractor
from unified_eval.shapes import Claims

ImageSet = Literal["real", "reconstructed", "generated", "other_real", "training"]
Need = Literal["extractor", "clip", "logits_extractor", "samples_per_caption", "training", "claims"]


@dataclass(eq=False)
class Inputs:
    """Images, captions and networks. All images have one size; only some metrics need the optional parts.

    Attributes:
        captions: N captions, all different.
        real: N images, one for each caption.
        reconstructed: the same images through the image tokenizer.
        generated: as many images for each caption, those of one caption adjacent.
        extractor: the network of :func:`unified_eval.load_extractor`.
        clip: the model of :func:`unified_eval.load_clip`.
        logits_extractor: the extractor ``inception-logits``.
        other_real: N real images of other captions.
        training: 2 or more of the images that the model was trained on, through the image tokenizer, whose losses would
            else count as distance; any iterable, read once and not kept.
        claims: for each caption, the claims that :func:`unified_eval.check_scene` checks.
        tags: the task of each caption.
        batch_size: images per forward pass.
        cache: folder of cached features.
        progress: show progress bars.

    Raises:
        ValueError: if there are fewer than 2 captions, one repeats, or sets differ in number or in the size of images.
    """

    captions: Sequence[str]
    real: Sequence[Image.Image]
    reconstructed: Sequence[Image.Image]
    generated: Sequence[Image.Image]
    extractor: Extractor | None = None
    clip: Clip | None = None
    logits_extractor: Extractor | None = None
    other_real: Sequence[Image.Image] | None = None
    training: Iterable[LazyImage] | None = None
    claims: Sequence[Claims] | None = None
    tags: Sequence[str] | None = None
    batch_size: int = 64
    cache: str | Path | None = None
    progress: bool = False
    _features: dict[tuple[Extractor, ImageSet], np.ndarray] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        count = len(self.captions)
        if count < 2:
            raise ValueError(f"captions: {count} captions; distances need 2 or more images.")
        check_unique(self.captions)
        width, height = self.real[0].size if self.real else (0, 0)
        for kind in ("real", "reconstructed", "generated", "other_real"):
            images = getattr(self, kind)
            if images is None:
                continue
            if len(images) != count and not (kind == "generated" and images and len(images) % count == 0):
                raise ValueError(
                    f"{kind}: {len(images)} images for {count} captions; distances compare at equal N only."
                )
            for number, image in enumerate(images):
                if image.size != (width, height):
                    raise ValueError(
                        f"{kind}: number {number} is {image.width}x{image.height}, the first real image is "
                        f"{width}x{height}; bring all to one size."
                    )

    def require(self, need: Need) -> Any:
        """An optional part. Raises ValueError if it was not given."""
        if need not in self.given():
            raise ValueError(f"{need}: a metric needs it; give it.")
        return getattr(self, need)

    def given(self) -> set[str]:
        """Names of the optional parts that are there."""
        parts = {need for need in get_args(Need) if getattr(self, need) is not None}
        return parts if self.samples_per_caption > 1 else parts - {"samples_per_caption"}

    @property
    def samples_per_caption(self) -> int:
        """Generated images for each caption."""
        return len(self.generated) // len(self.captions)

    @cached_property
    def owners(self) -> list[int]:
        """For each generated image, the number of its caption."""
        return [index for index in range(len(self.captions)) for _ in range(self.samples_per_caption)]

    @property
    def prompts(self) -> list[str]:
        """For each generated image, its caption."""
        return [self.captions[owner] for owner in self.owners]

    @property
    def size(self) -> dict[str, list[int]]:
        """Width and height of all images, as a part of recipes."""
        return {"size": list(self.real[0].size)}

    @cached_property
    def clip_extractor(self) -> Extractor:
        """The image tower of ``clip``."""
        return clip_extractor(self.require("clip"), self.clip_recipe)

    @cached_property
    def clip_recipe(self) -> dict[str, Any]:
        """Recipe of a number that is made of features of ``clip``."""
        return {**clip_recipe(self.require("clip")), **self.size}

    @property
    def recipe(self) -> dict[str, Any]:
        """Recipe of a number that is made of features of ``extractor``."""
        return {**self.require("extractor").recipe(), **self.size}

    def features(self, kind: ImageSet, network: Extractor | None = None) -> np.ndarray:
        """Features of a set of images, ``(images, D)`` float64, computed once; of ``extractor`` without ``network``."""
        network = network or self.require("extractor")
        key = (network, kind)
        if key not in self._features:
            images = getattr(self, kind)
            self._features[key] = extract_features(network, images, self.batch_size, self.cache, self.progress)
        return self._features[key]

    def one_each(self, kind: ImageSet, network: Extractor | None = None) -> np.ndarray:
        """Features with one row for each caption, ``(N, D)``: of generated images, the first of each caption."""
        return self.features(kind, network)[:: self.samples_per_caption if kind == "generated" else 1]


def load_networks(
    needs: Container[Need],
    clip: str | Path | None = None,
    extractor: str = EXTRACTORS[0],
    inception_weights: str | Path | None = None,
    device: str = "cpu",
) -> dict[str, Any]:
    """Load the networks that are needed, by their names in :class:`Inputs`.

    Args:
        needs: needs of metrics.
        clip: path or name for :func:`unified_eval.load_clip`.
        extractor: one of :data:`EXTRACTORS`.
        inception_weights: weights file of the inception extractors.
        device: device of the networks.

    Raises:
        ValueError: if a network or its weights are missing.
    """
    networks: dict[str, Any] = {}
    if "clip" in needs:
        if clip is None:
            raise ValueError("clip: a metric needs it; give a CLIP or leave the metric out.")
        networks["clip"] = load_clip(clip)
        networks["clip"].model.to(device)
    if "extractor" in needs:
        weights = inception_weights if extractor == "inception" else None
        networks["extractor"] = load_extractor(extractor, weights, device)
    if "logits_extractor" in needs:
        networks["logits_extractor"] = load_extractor(LOGITS_EXTRACTOR, inception_weights, device)
    return networks

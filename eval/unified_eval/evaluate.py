"""The figures of a text-to-picture model, each with its floor, its ceiling and the recipe that decides its value."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from unified_eval.clip import Clip, clip_features, clip_recipe, clip_score, retrieval_at_1, shuffled_score
from unified_eval.features import Extractor
from unified_eval.frechet import frechet_distance, kernel_distance
from unified_eval.reconstruction import psnr_summary, reconstruct

if TYPE_CHECKING:
    from unified_tokenizers.base import ImageTokenizer


def evaluate_pictures(
    real: Sequence[Image.Image],
    reconstructed: Sequence[Image.Image],
    generated: Sequence[Image.Image],
    captions: Sequence[str],
    clip: Clip,
    extractor: Extractor,
    other_real: Sequence[Image.Image] | None = None,
    seed: int = 0,
    batch_size: int = 64,
    progress: bool = False,
) -> dict[str, dict[str, Any]]:
    """Measure generated pictures against the real ones of the same captions, at equal N.

    With an extractor whose key is ``fd_efflite0``, the figures are:

    - ``fd_efflite0``, ``kd_efflite0_x1000``: of generated to real pictures (Frechet; unbiased kernel x 1000).
    - ``fd_efflite0_reconstructions``: of reconstructions to real pictures, what the tokenizer alone costs.
    - ``fd_efflite0_real_halves``: of a random half of the real pictures to the other, at N/2 (given 4 or more).
    - ``fd_efflite0_real_other``: of other real pictures to the real ones, at N; only with ``other_real``.
    - ``clip_score``, ``clip_score_real``, ``clip_score_reconstructions``: 100 x mean cosine with the own caption;
      ``clip_score_shuffled``: of generated pictures with all other captions; ``clip_score_gap``: the difference.
    - ``r1_generated``, ``r1_real``, ``r1_reconstructions``: share of pictures nearest to their own of the N captions.

    Args:
        real: N pictures.
        reconstructed: the same pictures through the image tokenizer.
        generated: one picture for each caption.
        captions: N captions, all different.
        clip: what :func:`unified_eval.load_clip` returned.
        extractor: what :func:`unified_eval.load_extractor` returned.
        other_real: N real pictures of other captions.
        seed: seed of the split into halves.
        batch_size: pictures per forward pass.
        progress: show progress bars.

    Returns:
        ``figures``, numbers by name; and ``recipes``, for each of them what decides its value (with ``label``, the name
        to print).

    Raises:
        ValueError: if there are fewer than 2 pictures, the lists differ in length, or a caption repeats or is too long.
    """
    count = len(captions)
    if count < 2:
        raise ValueError(f"captions: {count} captions; distances need 2 or more pictures.")
    sets = {"real": real, "reconstructed": reconstructed, "generated": generated}
    for field, pictures in {**sets, **({"other_real": other_real} if other_real is not None else {})}.items():
        if len(pictures) != count:
            raise ValueError(
                f"{field}: {len(pictures)} pictures for {count} captions; distances compare at equal N only."
            )
    figures, recipes = _caption_figures(sets, captions, clip, batch_size, progress)

    features = {field: extractor(pictures, batch_size, progress) for field, pictures in sets.items()}
    name, key, base = extractor.metric, extractor.key, extractor.recipe()

    def add(suffix: str, label: str, a: np.ndarray, b: np.ndarray, **recipe: Any) -> None:
        figures[key + suffix] = frechet_distance(a, b)
        recipes[key + suffix] = {"label": f"{name}, {label}", "n": len(a), "n_reference": len(b), **base, **recipe}

    add(
        "", "generated to real", features["generated"], features["real"], reference="real pictures of the same captions"
    )
    kernel_key = key.replace("fid", "kid") if key == "fid" else key.replace("fd_", "kd_", 1)
    figures[f"{kernel_key}_x1000"] = 1000 * kernel_distance(features["generated"], features["real"])
    kernel_name = "KID" if key == "fid" else name.replace("FD-", "KD-", 1)
    recipes[f"{kernel_key}_x1000"] = recipes[key] | {
        "label": f"{kernel_name} x 1000, generated to real", "kernel": "(x.y / D + 1)^3, unbiased, no subsets",
    }  # fmt: skip
    add(
        "_reconstructions",
        "reconstructions to real",
        features["reconstructed"],
        features["real"],
        reference="the originals",
    )
    if count >= 4:
        order, half = np.random.default_rng(seed).permutation(count), count // 2
        first, second = features["real"][order[:half]], features["real"][order[half : 2 * half]]
        add("_real_halves", "half of real to the other half", first, second, reference="the other half", seed=seed)
    if other_real is not None:
        others = extractor(other_real, batch_size, progress)
        add("_real_other", "other real to real", others, features["real"], reference="real pictures of other captions")
    return {"figures": figures, "recipes": recipes}


def _caption_figures(
    sets: dict[str, Sequence[Image.Image]], captions: Sequence[str], clip: Clip, batch_size: int, progress: bool
) -> tuple[dict[str, float], dict[str, dict[str, Any]]]:
    figures: dict[str, float] = {}
    recipes: dict[str, dict[str, Any]] = {}
    base = {"n": len(captions), **clip_recipe(clip)}
    score_name = f"CLIP score ({clip.name})"
    kinds = {"generated": "", "real": "_real", "reconstructed": "_reconstructions"}
    for field, suffix in kinds.items():
        image_features, text_features = clip_features(clip, sets[field], captions, batch_size, progress)
        shown = suffix.strip("_") or "generated"
        figures[f"clip_score{suffix}"] = clip_score(image_features, text_features)
        recipes[f"clip_score{suffix}"] = {
            "label": f"{score_name}, {shown}",
            "formula": "100 * mean(cos), unclamped",
            **base,
        }
        figures[f"r1_{shown}"] = retrieval_at_1(image_features, text_features, captions)
        recipes[f"r1_{shown}"] = {
            "label": f"R@1 among {len(captions)} captions ({clip.name}), {shown}", "chance": 1 / len(captions), **base,
        }  # fmt: skip
        if field == "generated":
            figures["clip_score_shuffled"] = shuffled_score(image_features, text_features)
    figures["clip_score_gap"] = figures["clip_score"] - figures["clip_score_shuffled"]
    formula = "100 * mean(cos) over all mismatched pairs"
    recipes["clip_score_shuffled"] = {"label": f"{score_name}, generated, other captions", "formula": formula, **base}
    formula = "clip_score - clip_score_shuffled"
    recipes["clip_score_gap"] = {"label": f"{score_name}, own less other captions", "formula": formula, **base}
    return figures, recipes


def evaluate_tokenizer(
    tokenizer: "ImageTokenizer",
    images: Sequence[Image.Image],
    reference: str,
    batch_size: int = 32,
    progress: bool = False,
) -> dict[str, dict[str, Any]]:
    """Measure how well an image tokenizer gives pictures back that it should not have been trained on.

    Args:
        tokenizer: any image tokenizer.
        images: pictures of one size.
        reference: what the pictures are, for the recipe.
        batch_size: pictures per forward pass.
        progress: show a progress bar.

    Returns:
        ``figures`` with ``tokenizer_psnr_db`` (mean over pictures) and ``tokenizer_psnr_pooled_db`` (of the mean
        squared error of the set), and their ``recipes``.

    Raises:
        ValueError: as for :func:`unified_eval.reconstruct`.
    """
    summary = psnr_summary(images, reconstruct(tokenizer, images, batch_size, progress))
    base = {
        "n": len(images),
        "size": list(images[0].size),
        "reference": reference,
        "tokenizer_fingerprint": tokenizer.fingerprint,
        "peak": "255, on pictures rounded to 8 bits",
    }
    return {
        "figures": {"tokenizer_psnr_db": summary["mean_db"], "tokenizer_psnr_pooled_db": summary["pooled_db"]},
        "recipes": {
            "tokenizer_psnr_db": {"label": "tokenizer PSNR in dB, mean over pictures", **base},
            "tokenizer_psnr_pooled_db": {"label": "tokenizer PSNR in dB, of the pooled error", **base},
        },
    }


def recipe_line(recipe: dict[str, Any]) -> str:
    """Say a recipe in one line, for tables and reports."""
    parts = [f"N={recipe['n']}"]
    for field in ("clip", "extractor"):
        if field in recipe:
            digest = recipe.get("weights_sha256") or recipe.get("clip_state_sha256", "")
            parts.append(f"{recipe[field]} (sha256 {digest[:12]})")
    parts += [str(recipe[field]) for field in ("formula", "kernel", "resize", "reference") if field in recipe]
    if "chance" in recipe:
        parts.append(f"chance {recipe['chance']:.3f}")
    if "seed" in recipe:
        parts.append(f"seed {recipe['seed']}")
    return "; ".join(parts)

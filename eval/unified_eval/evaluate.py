"""The metrics of a text-to-picture model, each with its floor, its ceiling and the recipe that decides its value."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from unified_eval.clip import Clip, caption_rows, check_unique, clip_extractor, clip_recipe, clip_text_features
from unified_eval.diversity import inception_score, membership, nearest_neighbours, prompt_diversity
from unified_eval.extraction import Picture, extract_features
from unified_eval.features import Extractor
from unified_eval.frechet import cmmd, frechet_distance, kernel_distance
from unified_eval.measures import Measures
from unified_eval.reconstruction import psnr_summary, reconstruct
from unified_eval.shapes import Claims, scene_records, summarise_records

if TYPE_CHECKING:
    from unified_tokenizers.base import ImageTokenizer

METRICS = ("fd", "kd", "prdc", "clip", "clip_definitions", "cmmd", "is", "diversity", "neighbours", "shapes")
DEFAULT_METRICS = ("fd", "kd", "clip")
SUFFIX = {"generated": "", "real": "_real", "reconstructed": "_reconstructions"}
NEIGHBOUR = 5  # bounds the balls of precision, recall, density and coverage
COPY = 0.05  # share of training images that lie as near to another as what is called a copy


def evaluate_images(
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
    **settings: Any,
) -> dict[str, Any]:
    """:func:`measure_images`, as a dict of ``metrics``, ``intervals``, ``recipes`` and ``notes`` for JSON."""
    measures = measure_images(
        real, reconstructed, generated, captions, clip, extractor, other_real, seed, batch_size, progress, **settings
    )
    return measures.result()


def measure_images(
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
    *,
    metrics: Sequence[str] = DEFAULT_METRICS,
    training: Iterable[Picture] | None = None,
    claims: Sequence[Claims] | None = None,
    tags: Sequence[str] | None = None,
    logits_extractor: Extractor | None = None,
    resamples: int = 200,
    cache: str | Path | None = None,
) -> Measures:
    """Measure generated images against the real ones of the same captions, at equal N.

    With an extractor whose key is ``fd_efflite0``, the metrics have these metrics:

    - ``fd``: ``fd_efflite0``, Frechet, of generated to real images; ``_reconstructions`` to real: what the tokenizer
      alone costs; ``_real_halves``: a random half of the real images to the other, at N/2 (given 4 or more);
      ``_real_other``: other real images to the real ones, at N, with ``other_real``.
    - ``kd``: ``kd_efflite0_x1000``, unbiased kernel distance x 1000, of generated to real images.
    - ``prdc``: ``precision``, ``recall``, ``density``, ``coverage`` of generated among real images, and
      ``_reconstructions``.
    - ``clip``: ``clip_score``, ``_real``, ``_reconstructions``: 100 x mean cosine with the own caption; ``_shuffled``:
      of generated images with all other captions; ``_gap``: the difference. ``r1_generated``, ``r1_real``,
      ``r1_reconstructions``: share of images nearest to their own of the N captions.
    - ``clip_definitions``: the score of generated images as others define it: ``clip_score_clamped``
      (torchmetrics), ``clip_score_hessel`` and ``clip_cosine``.
    - ``cmmd``: of generated to real, and ``_reconstructions``, on the features of ``clip``.
    - ``is``: ``inception_score`` of generated images and ``_real``, with ``logits_extractor``.
    - ``diversity``: mean cosine distance between images of one caption; needs 2 or more of each.
    - ``neighbours``: ``neighbour_distance`` of generated images to the nearest ``training`` image, and
      ``_training``, of those to each other; ``neighbour_copies``, the share that is nearer to a training image than
      95 % of training images are to another: 0.05 for new images of the same kind, 1 for copies.
    - ``shapes``: what :func:`unified_eval.shapes.summarise_records` counts on generated images, and
      ``shapes_correct_real`` and ``shapes_correct_reconstructions``, the ceilings; needs ``claims``.

    With several images a caption, distances take the first of each and all else takes all.

    Args:
        real: N images.
        reconstructed: the same images through the image tokenizer.
        generated: as many images for each caption, those of one caption adjacent.
        captions: N captions, all different.
        clip: what :func:`unified_eval.load_clip` returned.
        extractor: what :func:`unified_eval.load_extractor` returned.
        other_real: N real images of other captions.
        seed: seed of the split into halves and of the intervals.
        batch_size: images per forward pass.
        progress: show progress bars.
        metrics: names out of :data:`METRICS`.
        training: 2 or more of the images that the model was trained on, through the image tokenizer: what it adds
            would else count as distance.
        claims: for each caption, what :func:`unified_eval.check_scene` takes.
        tags: the task of each caption.
        logits_extractor: the extractor ``inception-logits``.
        resamples: generates of prompts for the intervals of distances; 0 for none.
        cache: folder of cached features.

    Returns:
        The figures.

    Raises:
        ValueError: if a metric is unknown or lacks what it needs, there are fewer than 2 captions, a caption repeats
            or is too long, or the sets differ in number or in the size of their images.
    """
    needs = {"shapes": claims, "neighbours": training, "is": logits_extractor}
    for metric in metrics:
        if metric not in METRICS:
            raise ValueError(f"metrics: {metric!r} is unknown; use some of {list(METRICS)}.")
        if needs.get(metric, True) is None:
            what = {"shapes": "claims", "neighbours": "training", "is": "logits_extractor"}[metric]
            raise ValueError(f"metrics: {metric!r} needs {what}; give it or leave the metric out.")
    sets = {"real": real, "reconstructed": reconstructed, "generated": generated}
    each = _check_sets({**sets, **({"other_real": other_real} if other_real is not None else {})}, captions)
    owners = [index for index in range(len(captions)) for _ in range(each)]
    measures = Measures(captions, resamples, seed)

    def features(network: Extractor, pictures: Iterable[Picture]) -> np.ndarray:
        return extract_features(network, pictures, batch_size, cache, progress)

    size = {"size": list(real[0].size)}
    if {"clip", "clip_definitions", "cmmd"} & set(metrics):
        tower, text = clip_extractor(clip), clip_text_features(clip, captions, batch_size)
        vectors = {kind: features(tower, pictures) for kind, pictures in sets.items()}
        _add_clip(measures, vectors, text, clip, owners, metrics, size)
        if "cmmd" in metrics:
            unit = {kind: F.normalize(torch.from_numpy(rows), dim=1).numpy() for kind, rows in vectors.items()}
            for kind, suffix in (("generated", ""), ("reconstructed", "_reconstructions")):
                measures.add_distance(
                    f"cmmd{suffix}", cmmd, unit[kind][:: each if not suffix else 1], unit["real"],
                    f"CMMD ({clip.name}), {suffix.strip('_') or 'generated'} to real", kernel="Gaussian, sigma 10, x 1000",
                    reference="real images of the same captions", **clip_recipe(clip), **size,
                )  # fmt: skip
    if {"fd", "kd", "prdc", "diversity", "neighbours"} & set(metrics):
        rows = {kind: features(extractor, pictures) for kind, pictures in sets.items()}
        first = {**rows, "generated": rows["generated"][::each]}
        if other_real is not None and "fd" in metrics:
            first["other_real"] = features(extractor, other_real)
        base = {**extractor.recipe(), **size}
        _add_distances(measures, first, extractor, metrics, base)
        if "prdc" in metrics:
            _add_neighbourhoods(measures, first, extractor, base)
        if "diversity" in metrics:
            values = prompt_diversity(rows["generated"], owners)
            label = f"diversity of the {each} images of a caption ({extractor.name})"
            measures.add_mean(
                "diversity", np.array(list(values.values())), label, formula="mean pairwise cosine distance", **base
            )
        if "neighbours" in metrics and training is not None:
            _add_neighbours(measures, rows["generated"], features(extractor, training), owners, extractor, base)
    if "is" in metrics and logits_extractor is not None:
        measures.check_size("inception score", len(generated))
        for kind, suffix in (("generated", ""), ("real", "_real")):
            splits = 10 if len(sets[kind]) >= 1000 else 1  # parts of few images would lack most classes
            score, spread = inception_score(features(logits_extractor, sets[kind]), splits, seed)
            measures.add(f"inception_score{suffix}", score, f"Inception Score, {kind}", n=len(sets[kind]),
                         splits=splits, deviation_over_splits=spread, seed=seed, **logits_extractor.recipe(), **size)  # fmt: skip
    if "shapes" in metrics and claims is not None:
        _add_shapes(measures, sets, claims, tags, owners)
    return measures


def _check_sets(sets: dict[str, Sequence[Image.Image]], captions: Sequence[str]) -> int:
    """Check numbers and sizes; return how many images there are for each caption."""
    count = len(captions)
    if count < 2:
        raise ValueError(f"captions: {count} captions; distances need 2 or more images.")
    check_unique(captions)
    for field, pictures in sets.items():
        fits = len(pictures) % count == 0 and len(pictures) > 0 if field == "generated" else len(pictures) == count
        if not fits:
            raise ValueError(
                f"{field}: {len(pictures)} images for {count} captions; distances compare at equal N only."
            )
        for number, image in enumerate(pictures):
            if image.size != sets["real"][0].size:
                (width, height), (w, h) = image.size, sets["real"][0].size
                raise ValueError(
                    f"{field}: number {number} is {width}x{height}, the first real image is {w}x{h}; bring all to one size."
                )
    return len(sets["generated"]) // count


def _add_clip(
    measures: Measures,
    vectors: dict[str, np.ndarray],
    text: torch.Tensor,
    clip: Clip,
    owners: list[int],
    metrics: Sequence[str],
    size: dict[str, Any],
) -> None:
    base = {**clip_recipe(clip), **size}
    name, captions = f"CLIP score ({clip.name})", measures.prompts
    groups = {"generated": [captions[owner] for owner in owners]}
    for kind in ("generated", "real", "reconstructed"):
        own = owners if kind == "generated" else list(range(len(captions)))
        rows = caption_rows(torch.from_numpy(vectors[kind]), text, own)
        shown = SUFFIX[kind].strip("_") or "generated"
        if "clip" in metrics:
            measures.add_mean(f"clip_score{SUFFIX[kind]}", 100 * rows["own"], f"{name}, {shown}", groups.get(kind),
                              formula="100 * mean(cos), unclamped", **base)  # fmt: skip
            measures.add_mean(f"r1_{shown}", rows["hit"], f"R@1 among {len(captions)} captions ({clip.name}), {shown}",
                              groups.get(kind), chance=1 / len(captions), **base)  # fmt: skip
        if kind != "generated":
            continue
        if "clip" in metrics:
            measures.add_mean(
                "clip_score_shuffled", 100 * rows["others"], f"{name}, generated, other captions", groups[kind],
                formula="100 * mean(cos) over all mismatched pairs", **base,
            )  # fmt: skip
            measures.add_mean(
                "clip_score_gap", 100 * (rows["own"] - rows["others"]), f"{name}, own less other captions",
                groups[kind], formula="clip_score - clip_score_shuffled", **base,
            )  # fmt: skip
        if "clip_definitions" in metrics:
            prefixed = clip_text_features(clip, [f"A photo depicts {caption}" for caption in captions])
            hessel = caption_rows(torch.from_numpy(vectors[kind]), prefixed, own)["own"]
            for key, values, formula in (
                ("clip_cosine", rows["own"], "mean(cos)"),
                ("clip_score_hessel", 2.5 * hessel.clip(0), "2.5 * mean(max(cos, 0)), prefix 'A photo depicts'"),
            ):
                measures.add_mean(key, values, f"{name} as {formula}", groups[kind], formula=formula, **base)
            formula = "max(100 * mean(cos), 0)"
            measures.add("clip_score_clamped", max(100 * rows["own"].mean(), 0.0), f"{name} as {formula}",
                         n=len(own), formula=formula, **base)  # fmt: skip


def _add_distances(
    measures: Measures, rows: dict[str, np.ndarray], extractor: Extractor, metrics: Sequence[str], base: dict[str, Any]
) -> None:
    name, key, real = extractor.metric, extractor.key, rows["real"]
    same = "real images of the same captions"
    if "fd" in metrics:
        measures.check_size("frechet", len(real))
        for kind, suffix, label, reference in (
            ("generated", "", "generated to real", same),
            ("reconstructed", "_reconstructions", "reconstructions to real", "the originals"),
            ("other_real", "_real_other", "other real to real", "real images of other captions"),
        ):
            if kind in rows:
                measures.add_distance(
                    key + suffix, frechet_distance, rows[kind], real, f"{name}, {label}", **base, reference=reference
                )
        if len(real) >= 4:
            order, half = np.random.default_rng(measures.seed).permutation(len(real)), len(real) // 2
            value = frechet_distance(real[order[:half]], real[order[half : 2 * half]])
            measures.add(f"{key}_real_halves", value, f"{name}, half of real to the other half", n=half,
                         n_reference=half, **base, reference="the other half", seed=measures.seed)  # fmt: skip
    if "kd" in metrics:
        kernel_key = "kid" if key == "fid" else key.replace("fd_", "kd_", 1)
        kernel_name = "KID" if key == "fid" else name.replace("FD-", "KD-", 1)
        measures.add_distance(
            f"{kernel_key}_x1000", lambda a, b: 1000 * kernel_distance(a, b), rows["generated"], real,
            f"{kernel_name} x 1000, generated to real", **base, reference=same,
            kernel="(x.y / D + 1)^3, unbiased, no subsets",
        )  # fmt: skip


def _add_neighbourhoods(
    measures: Measures, rows: dict[str, np.ndarray], extractor: Extractor, base: dict[str, Any]
) -> None:
    measures.check_size("neighbourhoods", len(rows["real"]))
    for kind, suffix in (("generated", ""), ("reconstructed", "_reconstructions")):
        for name, values in membership(rows["real"], rows[kind], NEIGHBOUR)._asdict().items():
            label = f"{name} ({extractor.name}, k = {NEIGHBOUR}), {suffix.strip('_') or 'generated'}"
            measures.add_mean(f"{name}{suffix}", values, label, k=NEIGHBOUR, **base,
                              reference="real images of the same captions")  # fmt: skip


def _add_neighbours(
    measures: Measures,
    generated: np.ndarray,
    training: np.ndarray,
    owners: list[int],
    extractor: Extractor,
    base: dict[str, Any],
) -> None:
    groups = [measures.prompts[owner] for owner in owners]
    base = {**base, "n_reference": len(training), "reference": "training images", "formula": "cosine distance"}
    label = f"distance to the nearest training image ({extractor.name})"
    drawn = nearest_neighbours(generated, training)[1][:, 0]
    measures.add_mean("neighbour_distance", drawn, f"{label}, generated", groups, **base)
    # Each of some training images finds itself first, and then the nearest other.
    some = training[np.unique(np.linspace(0, len(training) - 1, min(len(training), 2000)).astype(int))]
    apart = nearest_neighbours(some, training, k=2)[1][:, 1]
    measures.add(
        "neighbour_distance_training", apart.mean(), f"{label}, of training images to others", n=len(some), **base
    )
    near = (drawn < np.quantile(apart, COPY)).astype(float)
    label = f"nearer to a training image than {1 - COPY:.0%} of those are to another ({extractor.name})"
    measures.add_mean("neighbour_copies", near, label, groups, chance=COPY, **base)


def _add_shapes(
    measures: Measures,
    sets: dict[str, Sequence[Image.Image]],
    claims: Sequence[Claims],
    tags: Sequence[str] | None,
    owners: list[int],
) -> None:
    all_claims = [claims[owner] for owner in owners]
    all_tags = [tags[owner] for owner in owners] if tags is not None else None
    groups = [measures.prompts[owner] for owner in owners]
    records = list(scene_records(sets["generated"], all_claims, all_tags, groups))
    summary = summarise_records(records, measures.seed)
    measures.figures |= summary["figures"]
    measures.intervals |= summary["intervals"]
    measures.recipes |= summary["recipes"]
    measures.rows["shapes_correct"] = (np.array([float(record["correct"]) for record in records]), list(groups))
    for kind in ("real", "reconstructed"):
        correct = [float(record["correct"]) for record in scene_records(sets[kind], claims)]
        label = f"pictures of shapes with every claim true, {SUFFIX[kind].strip('_')}"
        measures.add_mean(f"shapes_correct{SUFFIX[kind]}", np.array(correct), label, checker="from pixels")


def evaluate_tokenizer(
    tokenizer: "ImageTokenizer",
    images: Sequence[Image.Image],
    reference: str,
    batch_size: int = 32,
    progress: bool = False,
) -> dict[str, dict[str, Any]]:
    """Measure how well an image tokenizer gives images back that it should not have been trained on.

    Args:
        tokenizer: any image tokenizer.
        images: images of one size.
        reference: what the images are, for the recipe.
        batch_size: images per forward pass.
        progress: show a progress bar.

    Returns:
        ``metrics`` with ``tokenizer_psnr_db`` (mean over images) and ``tokenizer_psnr_pooled_db`` (of the mean
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
        "peak": "255, on images rounded to 8 bits",
    }
    return {
        "figures": {"tokenizer_psnr_db": summary["mean_db"], "tokenizer_psnr_pooled_db": summary["pooled_db"]},
        "recipes": {
            "tokenizer_psnr_db": {"label": "tokenizer PSNR in dB, mean over images", **base},
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

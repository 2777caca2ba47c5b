"""The protocol of class-conditional ImageNet papers: what the evaluator of guided diffusion (ADM) computes, from features.

FID and sFID of means and covariances, the Inception Score of runs of 5,000 images, precision and recall with balls that
reach to the third neighbour. Source: Dhariwal and Nichol 2021, https://arxiv.org/abs/2105.05233, and its code
https://github.com/openai/guided-diffusion (evaluations/evaluator.py at 22e0df8). This is an independent implementation.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from unified_eval.diversity import inception_score
from unified_eval.features import ADM_WIDTHS, Extractor
from unified_eval.files import file_sha256
from unified_eval.frechet import Moments, frechet_distance_of_moments, moments_of
from unified_eval.npz import load_statistics, npz_shape
from unified_eval.results import Results

EVALUATOR = "guided-diffusion evaluations/evaluator.py at 22e0df8"
FULL = 50_000  # images of a published value
SPLIT = 5000  # images of a part of the Inception Score
NEIGHBOUR = 3  # bounds the balls of precision and recall
HALF_MAX = 65504.0  # largest number in half precision


class AdmFeatures(NamedTuple):
    """Features of N images, float32: pool ``(N, 2048)``, spatial ``(N, 2023)``, logits without bias ``(N, 1008)``."""

    pool: np.ndarray
    spatial: np.ndarray
    logits: np.ndarray


@dataclass
class Reference:
    """A reference batch.

    Attributes:
        path: its ``.npz`` file.
        images: number, height and width of its images; None if it has statistics alone.
        statistics: the means and covariances that it brings along; empty if it has images alone.
    """

    path: Path
    images: tuple[int, int, int] | None
    statistics: dict[str, np.ndarray]


def open_reference(path: str | Path) -> Reference:
    """Open a reference batch of ADM: with images (``arr_0``), statistics (``mu``, ``sigma``, ``mu_s``, ``sigma_s``), or both.

    Raises:
        ValueError: if the file has neither, too few images or statistics of other features, or as for
            :func:`unified_eval.npz.load_statistics`.
    """
    path = Path(path)
    try:
        reference = Reference(path, npz_shape(path), load_statistics(path))
    except ValueError as error:
        raise ValueError(f"reference: {str(error).removeprefix('path: ')}") from error
    if reference.images is None and "mu" not in reference.statistics:
        raise ValueError(f"reference: {str(path)!r} has neither images (arr_0) nor statistics (mu, sigma).")
    for mean, width in zip(("mu", "mu_s"), ADM_WIDTHS, strict=False):
        if mean in reference.statistics and len(reference.statistics[mean]) != width:
            raise ValueError(
                f"reference: {mean} of {str(path)!r} has {len(reference.statistics[mean])} features, ADM's has {width}; "
                "take a batch of ADM, or make its statistics again."
            )
    if reference.images is not None and reference.images[0] <= NEIGHBOUR:
        raise ValueError(f"reference: {str(path)!r} has {reference.images[0]} images; give more than {NEIGHBOUR}.")
    return reference


def split_features(rows: np.ndarray) -> AdmFeatures:
    """The parts of the rows of the extractor ``inception-adm``."""
    pool, spatial, _ = ADM_WIDTHS
    return AdmFeatures(rows[:, :pool], rows[:, pool : pool + spatial], rows[:, pool + spatial :])


def score_in_runs(logits: np.ndarray, size: int = SPLIT) -> float:
    """Inception Score as ADM takes it: the mean over runs of ``size`` images in their order; the last may be shorter."""
    runs = [logits[start : start + size] for start in range(0, len(logits), size)]
    return float(np.mean([inception_score(run, 1)[0] if len(run) > 1 else 1.0 for run in runs]))


def precision_and_recall(
    real: np.ndarray,
    generated: np.ndarray,
    k: int = NEIGHBOUR,
    block: tuple[int, int] = (2048, 8192),
    device: str | torch.device = "cpu",
) -> tuple[float, float, bool]:
    """Share of generated rows inside a ball of a real one, and of real rows inside a ball of a generated one.

    A ball reaches to the k-th nearest row of its own set, itself not counted, and holds what lies on its surface. Squared
    distances are rounded to half precision as ADM does, unless one of them could exceed its range: features, products
    and each sum, with products added up in single precision as on its GPUs.

    Args:
        real: ``(N, D)`` features.
        generated: ``(M, D)`` features.
        k: which neighbour bounds a ball.
        block: rows and columns of the distances in memory at a time; the result does not depend on them.
        device: where distances are computed.

    Returns:
        Precision, recall, and whether distances were in half precision.

    Raises:
        ValueError: if a set has ``k`` rows or fewer.

    Source: Kynkäänniemi et al. 2019, https://arxiv.org/abs/1904.06991.
    """
    if min(len(real), len(generated)) <= k:
        raise ValueError(f"k: {k} of {len(real)} real and {len(generated)} generated rows; give more images than k.")
    sets = [torch.from_numpy(np.ascontiguousarray(rows, dtype=np.float32)) for rows in (real, generated)]
    half = sum(float(rows.norm(dim=1).max()) for rows in sets) ** 2 < HALF_MAX
    if half:
        sets = [rows.half().float() for rows in sets]
    a, b = sets
    radii_a, radii_b = (_radii(rows, k, half, block, device) for rows in sets)
    a_inside, b_inside = torch.zeros(len(a), dtype=torch.bool), torch.zeros(len(b), dtype=torch.bool)
    for rows in _ranges(len(a), block[0]):
        for columns in _ranges(len(b), block[1]):
            squares = _squares(a[rows].to(device), b[columns].to(device), half)
            a_inside[rows] |= (squares <= radii_b[columns].to(device)).any(1).cpu()
            b_inside[columns] |= (squares <= radii_a[rows, None].to(device)).any(0).cpu()
    return float(b_inside.double().mean()), float(a_inside.double().mean()), half


def measure_adm(
    generated: np.ndarray,
    real: np.ndarray | None,
    reference: Reference,
    network: Extractor,
    size: tuple[int, int],
    device: str | torch.device = "cpu",
) -> Results:
    """FID, sFID, Inception Score, precision and recall of generated images against a reference batch.

    A value has its published name only with the published weights, and FID-50k only of 50,000 images.

    Args:
        generated: rows of ``network`` for the generated images, float32.
        real: rows for the images of the reference batch; None if it has statistics alone.
        reference: the reference batch.
        network: the extractor ``inception-adm``.
        size: height and width of the generated images.
        device: where distances for precision and recall are computed.

    Raises:
        ValueError: if there are too few images, or the statistics of the reference batch are of other features.
    """
    own, count = split_features(generated), len(generated)
    there = None if real is None else split_features(real)
    results = Results([], resamples=0)
    names = _names(network, count, results)
    recipe: dict[str, Any] = {**network.recipe(), "n": count, "image_size": list(size), "evaluator": EVALUATOR}
    named: dict[str, Any] = {"reference": reference.path.name, "reference_sha256": file_sha256(reference.path)}

    # 1. Distances, to the statistics of the batch if it has them, as they may be of more images than it holds.
    for part, mean, covariance in (("pool", "mu", "sigma"), ("spatial", "mu_s", "sigma_s")):
        key, label = names[part]
        if mean in reference.statistics:
            moments = Moments(*(torch.from_numpy(reference.statistics[name]) for name in (mean, covariance)))
            origin: dict[str, Any] = {"statistics": "of the reference batch"}
        elif there is not None and not reference.statistics:
            moments, origin = (
                moments_of(getattr(there, part)),
                {"statistics": "of its images", "n_reference": len(there.pool)},
            )
        else:
            results.note(f"{label}: {reference.path.name} has no {mean}; left out.")
            continue
        number = frechet_distance_of_moments(moments_of(getattr(own, part)), moments)
        results.add(key, number, label, features_of=part, **recipe, **named, **origin)

    # 2. The score, of the generated images alone.
    key, label = names["logits"]
    results.add(key, score_in_runs(own.logits), label, formula=f"mean over runs of {SPLIT:,}, in order", **recipe)

    # 3. Precision and recall, to the images of the batch.
    if there is None:
        results.note(f"precision, recall: {reference.path.name} has no images (arr_0); left out.")
        return results
    *shares, half = precision_and_recall(there.pool, own.pool, device=device)
    for name, share in zip(("precision", "recall"), shares, strict=True):
        results.add(
            name, share, f"{name} ({network.name}, k = {NEIGHBOUR})", k=NEIGHBOUR, n_reference=len(there.pool),
            distances="half precision, as ADM" if half else "single precision: too long for half", **recipe, **named,
        )  # fmt: skip
    return results


def _names(network: Extractor, count: int, results: Results) -> dict[str, tuple[str, str]]:
    """Key and label of each value by the features that it is made of; notes say why it is not the published name."""
    if network.note:
        results.note(network.note)
        return {
            "pool": ("fd_inception_pool", "Frechet distance, pool features of unknown weights"),
            "spatial": ("fd_inception_spatial", "Frechet distance, spatial features of unknown weights"),
            "logits": ("exp_kl_classes", "exp KL of class scores of unknown weights"),
        }
    if count == FULL:
        return {
            "pool": ("fid_50k", "FID-50k"), "spatial": ("sfid_50k", "sFID-50k"), "logits": ("inception_score", "Inception Score")
        }  # fmt: skip
    results.note(
        f"{count:,} images, not {FULL:,}: these values do not compare with FID-50k or any other published one."
    )
    return {
        "pool": ("fid", f"FID of {count:,} images"), "spatial": ("sfid", f"sFID of {count:,} images"),
        "logits": ("inception_score", f"Inception Score of {count:,} images"),
    }  # fmt: skip


def _ranges(count: int, size: int) -> list[slice]:
    return [slice(start, start + size) for start in range(0, count, size)]


def _radii(rows: Tensor, k: int, half: bool, block: tuple[int, int], device: str | torch.device) -> Tensor:
    """Squared distance of every row to its k-th nearest other row: that of k + 1 with itself, as ADM counts."""
    out = []
    for some in _ranges(len(rows), block[0]):
        nearest = None
        for others in _ranges(len(rows), block[1]):
            squares = _squares(rows[some].to(device), rows[others].to(device), half)
            nearest = squares if nearest is None else torch.cat([nearest, squares], dim=1)
            nearest = nearest.topk(min(k + 1, nearest.shape[1]), dim=1, largest=False).values
        assert nearest is not None
        out.append(nearest.max(dim=1).values.cpu())
    return torch.cat(out)


def _squares(a: Tensor, b: Tensor, half: bool) -> Tensor:
    """Squared distances ``(N, M)`` float32; with ``half``, of rows and with every result rounded to half precision."""
    lengths_a, lengths_b, products = a.square().sum(1)[:, None], b.square().sum(1), a @ b.T
    if half:
        lengths_a, lengths_b, products = lengths_a.half(), lengths_b.half(), products.half()
    return (lengths_a - 2 * products + lengths_b).clamp_(min=0).float()

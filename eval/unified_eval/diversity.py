"""How images fill the space of features: fidelity and coverage, Inception Score, diversity, nearest neighbours."""

from collections.abc import Hashable, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from unified_eval.frechet import Features, checked, checked_pair, mean_off_diagonal, squared_distances

CHUNK = 512  # rows of a distance matrix at a time


class Membership(NamedTuple):
    """The values whose means are precision, recall, density and coverage.

    ``precision`` and ``density`` have a value for each fake row, ``recall`` and ``coverage`` for each real one.
    """

    precision: np.ndarray
    recall: np.ndarray
    density: np.ndarray
    coverage: np.ndarray


def precision_recall_density_coverage(real: Features, fake: Features, k: int = 5) -> dict[str, float]:
    """Share of fake images among the real ones and the reverse, and their sturdier successors.

    A real row has a ball that reaches to its k-th nearest other real row; likewise a fake row.

    - ``precision``: share of fake rows inside some real ball; ``recall``: share of real rows inside some fake ball.
    - ``density``: mean number of real balls around a fake row, by k; 1 for equal distributions, may exceed it.
    - ``coverage``: share of real balls with a fake row inside; collapse to few images shows here and in recall.

    Published precision and recall have k = 3, density and coverage k = 5. All depend on N: compare at equal N.

    Args:
        real: ``(N, D)`` features.
        fake: ``(M, D)`` features.
        k: which neighbour bounds a ball.

    Raises:
        ValueError: if a set has ``k`` rows or fewer, or as for :func:`unified_eval.frechet_distance`.

    Source: Kynkäänniemi et al. 2019, https://arxiv.org/abs/1904.06991; Naeem et al. 2020,
    https://arxiv.org/abs/2002.09797.
    """
    rows = membership(real, fake, k)
    return {name: float(values.mean()) for name, values in rows._asdict().items()}


def membership(real: Features, fake: Features, k: int = 5) -> Membership:
    """The rows whose means :func:`precision_recall_density_coverage` returns. Arguments and errors as there."""
    real_rows, fake_rows = checked_pair(real, fake, ("real", "fake"))
    if not 1 <= k < min(len(real_rows), len(fake_rows)):
        raise ValueError(
            f"k: {k} of {len(real_rows)} real and {len(fake_rows)} fake rows; give 1 or more, and more images than k."
        )
    middle = real_rows.mean(0)  # distances are the same around any origin, and rounded least around this one
    real_rows, fake_rows = real_rows - middle, fake_rows - middle
    real_radii, fake_radii = _kth_distances(real_rows, k), _kth_distances(fake_rows, k)
    precision, density, recall = [], [], []
    covered = torch.zeros(len(real_rows), dtype=torch.bool)
    for chunk in fake_rows.split(CHUNK):
        inside = squared_distances(chunk, real_rows) <= real_radii
        precision.append(inside.any(1))
        density.append(inside.double().sum(1) / k)
        covered |= inside.any(0)
    for chunk in real_rows.split(CHUNK):
        recall.append((squared_distances(chunk, fake_rows) <= fake_radii).any(1))
    parts = (torch.cat(precision), torch.cat(recall), torch.cat(density), covered)
    return Membership(*(part.double().numpy() for part in parts))


def inception_score(logits: Features, splits: int = 10, seed: int | None = None) -> tuple[float, float]:
    """Inception Score: ``exp(mean KL(p(y|x) || p(y)))`` in each split; the mean and standard deviation over splits.

    It looks at no reference and says little about images unlike ImageNet's.

    Args:
        logits: ``(N, C)`` of a classifier; the original takes Inception's without the last bias.
        splits: number of parts, in which N is cut in order.
        seed: shuffle the rows first; None keeps their order.

    Raises:
        ValueError: if there are fewer rows than splits, or as for :func:`unified_eval.frechet_distance`.

    Source: Salimans et al. 2016, https://arxiv.org/abs/1606.03498.
    """
    rows = checked("logits", logits)
    if not 1 <= splits <= len(rows):
        raise ValueError(f"splits: {splits} for {len(rows)} images; give 1 to {len(rows)}.")
    if seed is not None:
        rows = rows[torch.from_numpy(np.random.default_rng(seed).permutation(len(rows)))]
    edges = [index * len(rows) // splits for index in range(splits + 1)]
    scores = []
    for low, high in pairwise(edges):
        log_p = rows[low:high].log_softmax(1)
        log_marginal = log_p.logsumexp(0) - np.log(high - low)
        scores.append(float((log_p.exp() * (log_p - log_marginal)).sum(1).mean().exp()))
    return float(np.mean(scores)), float(np.std(scores))


def prompt_diversity(features: Features, prompts: Sequence[Hashable]) -> dict[Hashable, float]:
    """How unlike the images of one prompt are: their mean pairwise cosine distance, 0 (equal) to 2, by prompt.

    Args:
        features: ``(N, D)``.
        prompts: the prompt of each row.

    Raises:
        ValueError: if a prompt has a single image, lengths differ, a row is zero, or as for
            :func:`unified_eval.frechet_distance`.
    """
    rows = _unit("features", features)
    if len(prompts) != len(rows):
        raise ValueError(f"prompts: {len(prompts)} for {len(rows)} rows; give one for each.")
    members: dict[Hashable, list[int]] = {}
    for index, prompt in enumerate(prompts):
        members.setdefault(prompt, []).append(index)
    out: dict[Hashable, float] = {}
    for prompt, indices in members.items():
        if len(indices) < 2:
            raise ValueError(f"prompts: {prompt!r} has a single image; diversity needs 2 or more of each prompt.")
        cosines = rows[indices] @ rows[indices].T
        out[prompt] = 1 - float(mean_off_diagonal(cosines))
    return out


def nearest_neighbours(features: Features, reference: Features, k: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """The nearest reference rows of every row, by cosine distance: to find copies of training images.

    Args:
        features: ``(N, D)``.
        reference: ``(M, D)``, such as the training set.
        k: how many neighbours.

    Returns:
        Their row numbers ``(N, k)`` int64 and distances ``(N, k)`` float64, nearest first; equal ones by row number.

    Raises:
        ValueError: if ``k`` is not 1 to M, a row is zero, or as for :func:`unified_eval.frechet_distance`.
    """
    checked_pair(features, reference, ("features", "reference"))
    rows, others = _unit("features", features), _unit("reference", reference)
    if not 1 <= k <= len(others):
        raise ValueError(f"k: {k} for {len(others)} reference rows; give 1 to {len(others)}.")
    indices, distances = [], []
    for chunk in rows.split(CHUNK):
        values, order = (1 - chunk @ others.T).clamp(min=0).sort(dim=1, stable=True)
        indices.append(order[:, :k])
        distances.append(values[:, :k])
    return torch.cat(indices).numpy(), torch.cat(distances).numpy()


def _unit(field: str, features: Features) -> Tensor:
    rows = checked(field, features)
    lengths = rows.norm(dim=1, keepdim=True)
    if not bool((lengths > 0).all()):
        raise ValueError(f"{field}: row {int((lengths == 0).nonzero()[0, 0])} is zero and has no direction.")
    return rows / lengths


def _kth_distances(rows: Tensor, k: int) -> Tensor:
    """Squared distance of every row to its k-th nearest other row, rounded up so that ties count as inside."""
    parts = []
    for start in range(0, len(rows), CHUNK):
        squares = squared_distances(rows[start : start + CHUNK], rows)
        own = torch.arange(len(squares))
        squares[own, start + own] = torch.inf
        parts.append(squares.kthvalue(k, dim=1).values)
    slack = 1e-10 * rows.square().sum(1).max()
    return torch.cat(parts) + slack

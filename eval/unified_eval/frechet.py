"""Distances between two sets of features: Frechet (FID and its kin), the unbiased kernel distance (KID), and CMMD."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

Features = np.ndarray | Tensor


class Moments(NamedTuple):
    """Mean ``(D,)`` and covariance ``(D, D)`` of features, float64."""

    mean: Tensor
    covariance: Tensor


def frechet_distance(a: Features, b: Features) -> float:
    """Frechet distance between Gaussians fitted to two feature sets, exact for any number of rows.

    With centred rows ``A = (a - mean) / sqrt(N - 1)`` and ``B`` likewise, ``tr sqrt(Ca Cb)`` is the sum of the singular
    values of ``A B^T``, so no matrix square root is taken and no covariance is regularised. A set with more rows than
    columns is first replaced by the triangular factor of its QR decomposition, which has the same covariance.

    The estimate is biased upwards when N is small against D: compare distances at equal N only.

    Args:
        a: ``(N, D)`` features.
        b: ``(M, D)`` features.

    Returns:
        The distance, computed in float64; 0 for equal means and covariances.

    Raises:
        ValueError: if a set is not a matrix, has fewer than 2 rows or a value that is not finite, or the widths differ.

    Source: Heusel et al. 2017, https://arxiv.org/abs/1706.08500, equation 6.
    """
    rows_a, rows_b = checked_pair(a, b)
    mean_a, mean_b = rows_a.mean(0), rows_b.mean(0)
    return _distance(mean_a, _covariance_root(rows_a - mean_a), mean_b, _covariance_root(rows_b - mean_b))


def moments_of(features: np.ndarray, block: int = 4096) -> Moments:
    """Mean and unbiased covariance of features ``(N, D)`` of any precision; only a block is ever held in float64.

    Raises:
        ValueError: as for :func:`frechet_distance`.
    """
    parts = [features[start : start + block] for start in range(0, len(features), block)]
    if len(features) < 2 or features.ndim != 2:
        checked("features", features)
    mean = torch.stack([torch.from_numpy(part).double().sum(0) for part in parts]).sum(0) / len(features)
    if not torch.isfinite(mean).all():
        checked("features", features)
    covariance = torch.zeros(len(mean), len(mean), dtype=torch.float64)
    for part in parts:
        centred = torch.from_numpy(part).double() - mean
        covariance.addmm_(centred.T, centred)
    return Moments(mean, covariance / (len(features) - 1))


def frechet_distance_of_moments(a: Moments, b: Moments) -> float:
    """Frechet distance between two Gaussians, such as a set of features and the statistics of a reference batch.

    The roots of the covariances come from their eigenvectors, so that rounding of a singular one does no harm.

    Raises:
        ValueError: if the widths differ, a value is not finite, or a covariance has negative variances.
    """
    if a.mean.shape != b.mean.shape:
        raise ValueError(
            f"b: {len(b.mean)} features, but a has {len(a.mean)}; take both statistics from one extractor."
        )
    return _distance(a.mean, _symmetric_root("a", a.covariance), b.mean, _symmetric_root("b", b.covariance))


def kernel_distance(a: Features, b: Features) -> float:
    """Unbiased squared maximum mean discrepancy under the kernel ``(x.y / D + 1)^3``, over all rows (no subsets).

    Its expectation is 0 for two samples of one distribution whatever their size, so a value may be slightly negative.

    Args:
        a: ``(N, D)`` features.
        b: ``(M, D)`` features.

    Returns:
        The distance, computed in float64; often printed times 1000.

    Raises:
        ValueError: as for :func:`frechet_distance`.

    Source: Binkowski et al. 2018, https://arxiv.org/abs/1801.01401, section 4.
    """
    rows_a, rows_b = checked_pair(a, b)
    within_a = mean_off_diagonal(_cubic_kernel(rows_a, rows_a))
    within_b = mean_off_diagonal(_cubic_kernel(rows_b, rows_b))
    return float(within_a + within_b - 2 * _cubic_kernel(rows_a, rows_b).mean())


def kernel_distances_of_subsets(
    a: Features, b: Features, subset_size: int = 1000, subsets: int = 100, seed: int = 0
) -> np.ndarray:
    """Kernel distances of random subsets; KID as published is their mean, printed with their standard deviation.

    :func:`kernel_distance` of all rows has the same expectation and varies less.

    Args:
        a: ``(N, D)`` features.
        b: ``(M, D)`` features.
        subset_size: rows sampled of each, without repetition.
        subsets: how often.
        seed: seed of the subsets.

    Returns:
        ``(subsets,)`` float64.

    Raises:
        ValueError: if a set has fewer than ``subset_size`` rows, or as for :func:`frechet_distance`.
    """
    rows_a, rows_b = checked_pair(a, b)
    if not 2 <= subset_size <= min(len(rows_a), len(rows_b)):
        raise ValueError(
            f"subset_size: {subset_size} of {len(rows_a)} and {len(rows_b)} rows; give 2 to the smaller, or use "
            "kernel_distance, which needs no subsets."
        )
    chance = np.random.default_rng(seed)

    def subset(rows: Tensor) -> Tensor:
        return rows[torch.from_numpy(chance.choice(len(rows), subset_size, replace=False))]

    return np.array([kernel_distance(subset(rows_a), subset(rows_b)) for _ in range(subsets)])


def cmmd(a: Features, b: Features, sigma: float = 10.0, scale: float = 1000.0) -> float:
    """CLIP maximum mean discrepancy: squared, under a Gaussian kernel, over all pairs (each row with itself too).

    Published values are of CLIP ViT-L/14 at 336 pixels; with another network it is no CMMD but its kin.

    Args:
        a: ``(N, D)`` CLIP features of images, rows of length 1.
        b: ``(M, D)`` likewise.
        sigma: width of the kernel ``exp(-|x - y|^2 / (2 sigma^2))``.
        scale: factor of the result.

    Raises:
        ValueError: if a row is not of length 1, or as for :func:`frechet_distance`.

    Source: Jayasumana et al. 2024, https://arxiv.org/abs/2401.09603.
    """
    rows_a, rows_b = checked_pair(a, b)
    for field, rows in (("a", rows_a), ("b", rows_b)):
        if float((rows.norm(dim=1) - 1).abs().max()) > 1e-3:
            raise ValueError(f"{field}: rows are not of length 1; normalise the CLIP features first.")

    def mean_kernel(x: Tensor, y: Tensor) -> float:
        squares = squared_distances(x, y)
        # The kernel is 1 less about 1 % here, so that expm1 keeps the digits that differ.
        return float(torch.expm1(-squares / (2 * sigma**2)).mean())

    return scale * (mean_kernel(rows_a, rows_a) + mean_kernel(rows_b, rows_b) - 2 * mean_kernel(rows_a, rows_b))


def checked_pair(a: Features, b: Features, fields: tuple[str, str] = ("a", "b")) -> tuple[Tensor, Tensor]:
    """Two feature sets as float64 matrices of one width. Errors as for :func:`frechet_distance`, naming ``fields``."""
    rows_a, rows_b = checked(fields[0], a), checked(fields[1], b)
    if rows_a.shape[1] != rows_b.shape[1]:
        raise ValueError(
            f"{fields[1]}: {rows_b.shape[1]} features a row, but {fields[0]} has {rows_a.shape[1]}; "
            "take both sets from one extractor."
        )
    return rows_a, rows_b


def checked(field: str, features: Features) -> Tensor:
    """A feature set as a float64 matrix on the CPU. Errors as for :func:`frechet_distance`, naming ``field``."""
    try:
        rows = torch.as_tensor(features).detach().to("cpu", torch.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{field}: need a matrix (N, D) of features, got something else ({error}).") from error
    if rows.ndim != 2:
        raise ValueError(f"{field}: need a matrix (N, D) of features, got shape {tuple(rows.shape)}.")
    if len(rows) < 2:
        raise ValueError(f"{field}: {len(rows)} rows; a covariance needs 2 or more images.")
    if not torch.isfinite(rows).all():
        bad = int((~torch.isfinite(rows)).any(1).nonzero()[0])
        raise ValueError(f"{field}: row {bad} holds NaN or infinity; check the image it was made from.")
    return rows


def squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """Squared distances ``(N, M)`` by a matrix product; rounding leaves about 1e-12 of the squared lengths."""
    return a.square().sum(1)[:, None] + b.square().sum(1) - 2 * a @ b.T


def _covariance_root(centred: Tensor) -> Tensor:
    """Some R with ``R^T R`` = the covariance of the rows, at most D rows high."""
    rows, width = centred.shape
    root = centred / (rows - 1) ** 0.5
    return torch.linalg.qr(root, mode="r").R if rows > width else root


def _symmetric_root(field: str, covariance: Tensor) -> Tensor:
    """Some R with ``R^T R`` = a covariance matrix."""
    if not torch.isfinite(covariance).all():
        raise ValueError(f"{field}: the covariance holds NaN or infinity; make the statistics again.")
    variances, directions = torch.linalg.eigh(covariance)
    if float(variances[0]) < -1e-6 * max(float(variances[-1]), 1e-12):
        raise ValueError(f"{field}: the covariance has the eigenvalue {float(variances[0]):.3g}; make it again.")
    return (directions * variances.clamp(min=0).sqrt()).T


def _distance(mean_a: Tensor, root_a: Tensor, mean_b: Tensor, root_b: Tensor) -> float:
    """Frechet distance of means and roots of covariances."""
    cross = torch.linalg.svdvals(root_a @ root_b.T).sum()
    distance = (mean_a - mean_b).square().sum() + root_a.square().sum() + root_b.square().sum() - 2 * cross
    return max(float(distance), 0.0)  # rounding can leave about -1e-12 for equal sets


def _cubic_kernel(a: Tensor, b: Tensor) -> Tensor:
    return (a @ b.T / a.shape[1] + 1) ** 3


def mean_off_diagonal(matrix: Tensor) -> Tensor:
    """Mean of the entries of a square matrix that are not on its diagonal."""
    count = len(matrix)
    return (matrix.sum() - matrix.trace()) / (count * (count - 1))

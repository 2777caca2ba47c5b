"""Distances between two sets of features: Frechet (FID and its kin) and the unbiased kernel distance (KID)."""

import numpy as np
import torch
from torch import Tensor

Features = np.ndarray | Tensor


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
    rows_a, rows_b = _checked_pair(a, b)
    mean_a, mean_b = rows_a.mean(0), rows_b.mean(0)
    root_a, root_b = _covariance_root(rows_a - mean_a), _covariance_root(rows_b - mean_b)
    cross = torch.linalg.svdvals(root_a @ root_b.T).sum()
    distance = (mean_a - mean_b).square().sum() + root_a.square().sum() + root_b.square().sum() - 2 * cross
    return max(float(distance), 0.0)  # rounding can leave about -1e-12 for equal sets


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
    rows_a, rows_b = _checked_pair(a, b)
    within_a = _mean_off_diagonal(_cubic_kernel(rows_a, rows_a))
    within_b = _mean_off_diagonal(_cubic_kernel(rows_b, rows_b))
    return float(within_a + within_b - 2 * _cubic_kernel(rows_a, rows_b).mean())


def _checked_pair(a: Features, b: Features) -> tuple[Tensor, Tensor]:
    rows_a, rows_b = _checked("a", a), _checked("b", b)
    if rows_a.shape[1] != rows_b.shape[1]:
        raise ValueError(
            f"b: {rows_b.shape[1]} features a row, but a has {rows_a.shape[1]}; take both sets from one extractor."
        )
    return rows_a, rows_b


def _checked(field: str, features: Features) -> Tensor:
    rows = torch.as_tensor(features).detach().to("cpu", torch.float64)
    if rows.ndim != 2:
        raise ValueError(f"{field}: need a matrix (N, D) of features, got shape {tuple(rows.shape)}.")
    if len(rows) < 2:
        raise ValueError(f"{field}: {len(rows)} rows; a covariance needs 2 or more pictures.")
    if not torch.isfinite(rows).all():
        bad = int((~torch.isfinite(rows)).any(1).nonzero()[0])
        raise ValueError(f"{field}: row {bad} holds NaN or infinity; check the picture it was made from.")
    return rows


def _covariance_root(centred: Tensor) -> Tensor:
    """Some R with ``R^T R`` = the covariance of the rows, at most D rows high."""
    rows, width = centred.shape
    root = centred / (rows - 1) ** 0.5
    return torch.linalg.qr(root, mode="r").R if rows > width else root


def _cubic_kernel(a: Tensor, b: Tensor) -> Tensor:
    return (a @ b.T / a.shape[1] + 1) ** 3


def _mean_off_diagonal(kernel: Tensor) -> Tensor:
    count = len(kernel)
    return (kernel.sum() - kernel.trace()) / (count * (count - 1))

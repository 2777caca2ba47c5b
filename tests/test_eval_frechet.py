"""Frechet and kernel distances against closed forms and other implementations."""

import numpy as np
import pytest
import torch
from torchmetrics.image.kid import poly_mmd

from unified_eval import cmmd, frechet_distance, kernel_distance, kernel_distances_of_subsets


def diagonal_set(deviations: list[float], mean: list[float]) -> np.ndarray:
    """2D rows whose mean is exactly ``mean`` and whose covariance is exactly diagonal."""
    width = len(deviations)
    steps = np.diag(deviations) * np.sqrt((2 * width - 1) / 2)
    return np.concatenate([steps, -steps]) + np.asarray(mean)


def by_matrix_square_root(a: np.ndarray, b: np.ndarray) -> float:
    """The textbook formula, with tr sqrt(Ca Cb) = tr sqrt(Ca^1/2 Cb Ca^1/2) through symmetric eigenvalues."""
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    values, vectors = np.linalg.eigh(cov_a)
    root_a = vectors @ np.diag(np.sqrt(values.clip(0))) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root_a @ cov_b @ root_a).clip(0)).sum()
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(cov_a) + np.trace(cov_b) - 2 * cross)


def test_closed_form_of_diagonal_gaussians():
    a = diagonal_set([1.0, 2.0, 3.0], [0.0, 0.0, 0.0])
    b = diagonal_set([2.0, 2.0, 1.0], [1.0, -2.0, 0.5])
    assert frechet_distance(a, b) == pytest.approx((1 + 4 + 0.25) + (1 + 0 + 4), rel=1e-12)


@pytest.mark.parametrize(("rows_a", "rows_b", "width"), [(200, 150, 12), (9, 7, 40), (100, 7, 40), (41, 40, 40)])
def test_agrees_with_the_matrix_square_root(rows_a, rows_b, width):
    rng = np.random.default_rng(rows_a)
    mixing = rng.normal(size=(width, width))
    a, b = rng.normal(size=(rows_a, width)) @ mixing + 3, rng.normal(size=(rows_b, width))
    expected = by_matrix_square_root(a, b)
    assert expected > 1
    # The reference takes roots of eigenvalues that are zero but for rounding, hence its looser digits.
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-6)
    assert frechet_distance(torch.tensor(b), torch.tensor(a)) == pytest.approx(frechet_distance(a, b), rel=1e-12)


def test_statistics_are_float64_whatever_comes_in():
    rng = np.random.default_rng(0)
    a, b = (rng.normal(size=(20, 64)).astype(np.float32) + 1000 for _ in range(2))
    assert frechet_distance(a, b) == pytest.approx(
        frechet_distance(a.astype(np.float64), b.astype(np.float64)), rel=1e-12
    )


def test_equal_sets_are_at_zero():
    a = np.random.default_rng(1).normal(size=(30, 8))
    assert 0 <= frechet_distance(a, a[::-1].copy()) < 1e-12


def test_kernel_distance_agrees_with_torchmetrics_and_is_unbiased():
    rng = np.random.default_rng(2)
    a, b = rng.normal(size=(40, 16)), rng.normal(size=(40, 16)) + 0.3
    assert kernel_distance(a, b) == pytest.approx(float(poly_mmd(torch.tensor(a), torch.tensor(b))), rel=1e-12)
    same = [kernel_distance(rng.normal(size=(30, 8)), rng.normal(size=(50, 8))) for _ in range(200)]
    assert abs(np.mean(same)) < 3 * np.std(same) / np.sqrt(200) and min(same) < 0


@pytest.mark.parametrize("distance", [frechet_distance, kernel_distance])
@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (np.array([[1.0, 2.0], [np.nan, 0.0]]), np.eye(2), "a: row 1 holds NaN or infinity"),
        (np.eye(2), np.array([[np.inf, 0.0], [0.0, 0.0]]), "b: row 0 holds NaN or infinity"),
        (np.eye(2)[:1], np.eye(2), "a: 1 rows; a covariance needs 2 or more"),
        (np.eye(3), np.eye(2), "b: 2 features a row, but a has 3"),
        (np.zeros(4), np.eye(2), r"a: need a matrix \(N, D\)"),
    ],
)
def test_bad_features_are_named(distance, a, b, message):
    with pytest.raises(ValueError, match=message):
        distance(a, b)


def test_subsets_have_the_expectation_of_all_rows():
    rng = np.random.default_rng(5)
    a, b = rng.normal(size=(60, 8)), rng.normal(size=(80, 8)) * 1.2
    found = kernel_distances_of_subsets(a, b, subset_size=20, subsets=400, seed=1)
    assert found.shape == (400,)
    # Samples from one finite set: their mean lies around the distance of all rows.
    assert found.mean() == pytest.approx(kernel_distance(a, b), abs=4 * found.std() / 20)
    all_rows = kernel_distances_of_subsets(a, b[:60], subset_size=60, subsets=2)
    assert all_rows == pytest.approx([kernel_distance(a, b[:60])] * 2, rel=1e-9)
    assert np.array_equal(found, kernel_distances_of_subsets(a, b, subset_size=20, subsets=400, seed=1))
    with pytest.raises(ValueError, match="subset_size: 61 of 60 and 80 rows"):
        kernel_distances_of_subsets(a, b, subset_size=61)


def unit(rows):
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def test_cmmd_agrees_with_a_sum_over_pairs():
    rng = np.random.default_rng(6)
    a, b = unit(rng.normal(size=(12, 5)) + 1), unit(rng.normal(size=(9, 5)))

    def mean_kernel(x, y):
        return np.mean([[np.exp(-sum((p - q) ** 2) / (2 * 10.0**2)) for q in y] for p in x])

    expected = 1000 * (mean_kernel(a, a) + mean_kernel(b, b) - 2 * mean_kernel(a, b))
    assert expected > 1
    assert cmmd(a, b) == pytest.approx(expected, rel=1e-9)
    assert cmmd(a, a) == pytest.approx(0, abs=1e-12)
    # Far narrower than the kernel, it is the squared distance of the means: 1000 / sigma^2 |dmu|^2.
    assert cmmd(a, b, sigma=1e3) == pytest.approx(1e-3 * ((a.mean(0) - b.mean(0)) ** 2).sum(), rel=1e-4)
    with pytest.raises(ValueError, match="b: rows are not of length 1; normalise"):
        cmmd(a, 2 * b)

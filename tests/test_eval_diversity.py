"""Fidelity, coverage, diversity and neighbours against brute force, closed forms and torch-fidelity."""

import numpy as np
import pytest
import torch
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_prc import calculate_precision_recall_full

from unified_eval import inception_score, nearest_neighbours, precision_recall_density_coverage, prompt_diversity
from unified_eval.diversity import membership


def by_loops(real, fake, k):
    """Straight from the definitions, one pair at a time."""

    def radius(rows, i):
        return sorted(np.linalg.norm(rows[i] - rows[j]) for j in range(len(rows)) if j != i)[k - 1]

    real_radii, fake_radii = ([radius(rows, i) for i in range(len(rows))] for rows in (real, fake))
    inside_real = np.array(
        [[np.linalg.norm(f - r) <= size for r, size in zip(real, real_radii, strict=True)] for f in fake]
    )
    inside_fake = np.array(
        [[np.linalg.norm(r - f) <= size for f, size in zip(fake, fake_radii, strict=True)] for r in real]
    )
    return {"precision": inside_real.any(1).mean(), "recall": inside_fake.any(1).mean(),
            "density": inside_real.sum() / (k * len(fake)), "coverage": inside_real.any(0).mean()}  # fmt: skip


@pytest.mark.parametrize(("rows_real", "rows_fake", "k"), [(40, 30, 3), (25, 35, 5), (12, 50, 1)])
def test_agrees_with_loops_and_torch_fidelity(rows_real, rows_fake, k):
    rng = np.random.default_rng(k)
    real, fake = rng.normal(size=(rows_real, 4)) + 100, 0.8 * rng.normal(size=(rows_fake, 4)) + 101.2
    ours = precision_recall_density_coverage(real, fake, k)
    assert ours == pytest.approx(by_loops(real, fake, k), rel=1e-12)
    assert 0 < ours["precision"] < 1 and 0 < ours["recall"] < 1
    precision, recall = calculate_precision_recall_full(torch.tensor(fake), torch.tensor(real), k)
    assert (ours["precision"], ours["recall"]) == pytest.approx((precision, recall), rel=1e-6)


def test_chunks_change_nothing(monkeypatch):
    rng = np.random.default_rng(0)
    real, fake = rng.normal(size=(50, 3)), rng.normal(size=(41, 3)) + 0.5
    whole = membership(real, fake, 3)
    monkeypatch.setattr("unified_eval.diversity.CHUNK", 7)
    assert all(np.array_equal(a, b) for a, b in zip(whole, membership(real, fake, 3), strict=True))
    distances = nearest_neighbours(real, fake, 2)
    monkeypatch.undo()
    assert np.array_equal(distances[0], nearest_neighbours(real, fake, 2)[0])


def test_equal_sets_and_collapse():
    rng = np.random.default_rng(1)
    real = rng.normal(size=(60, 6))
    same = precision_recall_density_coverage(real, real.copy(), k=5)
    # Every row is inside its own ball and those of the 5 rows that have it among their nearest.
    assert same == pytest.approx({"precision": 1, "recall": 1, "density": 6 / 5, "coverage": 1}, rel=1e-12)
    collapsed = precision_recall_density_coverage(real, np.repeat(real[:1], 60, 0) + 1e-6 * rng.normal(size=(60, 6)))
    assert collapsed["precision"] == 1 and collapsed["recall"] <= 1 / 60 and collapsed["coverage"] < 0.3


def test_inception_score_agrees_with_torch_fidelity_and_closed_forms():
    logits = np.random.default_rng(2).normal(size=(53, 10)) * 3
    expected = isc_features_to_metric(torch.tensor(logits), splits=10, shuffle=False)
    assert inception_score(logits) == pytest.approx(tuple(expected.values()), rel=1e-12)
    certain = 1000 * np.tile(np.eye(4), (5, 1))  # sure of its class, all classes alike: the number of classes
    assert inception_score(certain, splits=5) == pytest.approx((4.0, 0.0))
    assert inception_score(np.zeros((8, 3)), splits=2) == pytest.approx((1.0, 0.0))
    assert inception_score(logits, 3, seed=1) != inception_score(logits, 3)


def test_diversity_of_known_vectors():
    rows = np.array([[1.0, 0.0], [0.0, 2.0], [3.0, 0.0], [3.0, 0.0], [-1.0, 0.0]])
    prompts = ["a", "a", "b", "b", "b"]
    # a: one right angle. b: two pairs of opposites and a pair of equals.
    assert prompt_diversity(rows, prompts) == pytest.approx({"a": 1.0, "b": (0 + 2 + 2) / 3})


def test_nearest_neighbours_of_known_vectors():
    train = np.array([[1.0, 0.0], [0.6, 0.8], [0.0, 5.0], [0.0, -1.0]])
    indices, distances = nearest_neighbours(np.array([[0.0, 3.0], [2.0, 0.1], [1.0, 0.0]]), train, k=2)
    assert indices.tolist() == [[2, 1], [0, 1], [0, 1]]
    np.testing.assert_allclose(distances[0], [0, 0.2], atol=1e-12)
    assert distances[2, 0] == 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: precision_recall_density_coverage(np.eye(4), np.eye(4), 4), "k: 4 of 4 real and 4 fake rows"),
        (lambda: precision_recall_density_coverage(np.eye(4) * np.nan, np.eye(4), 1), "real: row 0 holds NaN"),
        (lambda: inception_score(np.zeros((4, 3)), 5), "splits: 5 for 4 images; give 1 to 4"),
        (lambda: prompt_diversity(np.eye(3), ["a", "a", "b"]), "prompts: 'b' has a single image"),
        (lambda: prompt_diversity(np.eye(3), ["a", "a"]), "prompts: 2 for 3 rows"),
        (lambda: nearest_neighbours(np.eye(3), np.eye(3), 4), "k: 4 for 3 reference rows; give 1 to 3"),
        (lambda: nearest_neighbours(np.eye(3), np.eye(4)), "reference: 4 features a row, but features has 3"),
        (lambda: nearest_neighbours(np.eye(3), np.zeros((3, 3))), "reference: row 0 is zero"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()

"""Paired ratios from timings whose answer is known."""

import pytest

from unified_eval.timing import interleaved, paired_ratio


def test_rounds_are_interleaved_and_warm_up_is_dropped():
    calls = []
    timings = interleaved(
        {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=2, warmup=1, repeat=2
    )
    assert "".join(calls) == "aabb" * 3
    assert [len(values) for values in timings.values()] == [2, 2]


def test_ratio_is_the_median_over_pairs():
    timings = {"slow": [(2.0, 8.0), (9.0, 8.0), (4.0, 8.0)], "fast": [(1.0, 2.0), (3.0, 4.0), (2.0, 8.0)]}
    assert paired_ratio(timings, "slow", "fast") == {"ratio": 2.0, "spread": [2.0, 3.0]}
    assert paired_ratio(timings, "slow", "fast", cpu=True) == {"ratio": 2.0, "spread": [1.0, 4.0]}
    assert paired_ratio(timings, "slow", "fast", scale=0.5)["ratio"] == pytest.approx(1.0)

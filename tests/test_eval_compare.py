"""Evaluations that lie in folders compare as those in memory do."""

import json

import numpy as np
import pytest
from unified_evaluation import compare

from unified_eval.results import VALUES, Results, compare_results

PROMPTS = [f"prompt {number}" for number in range(6)]


def results(seed: int, better: float = 0.0) -> Results:
    """A mean with pairs, a distance with resamples, a plain number, and one about given images."""
    rng = np.random.default_rng(seed)
    made = Results(PROMPTS, resamples=20, seed=3)
    made.add_mean(
        "score", rng.random(12) + better, "score", [prompt for prompt in PROMPTS for _ in range(2)], formula="x"
    )
    made.add_mean("hits", (rng.random(6) > 0.5).astype(float), "hits")
    features = rng.random((6, 2))
    made.add_distance(
        "distance", lambda a, b: float(np.abs(a.mean() - b.mean())), features, np.zeros((6, 2)), "distance"
    )
    made.add("alone", rng.random(), "alone")
    made.add("real", 1.0, "real", given=True)
    return made


def test_saved_results_compare_as_those_in_memory(tmp_path, capsys):
    pair = results(0), results(1, better=5.0)
    for name, each in zip("ab", pair, strict=True):
        (tmp_path / name).mkdir()
        each.save(tmp_path / name / VALUES)
    expected = compare_results(*pair)
    assert compare_results(*(Results.load(tmp_path / name / VALUES) for name in "ab")) == expected
    assert [row["metric"] for row in expected] == ["score", "hits", "distance", "alone"]

    compare.main([str(tmp_path / "a"), str(tmp_path / "b"), "--out", str(tmp_path / "out")])
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("score"))
    assert line.endswith("higher")
    written = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert written["differences"] == json.loads(json.dumps(expected))
    assert "Differences in pairs" in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is no file of results"),
        ("[]", "is no file of results"),
        ('{"prompts": ["a"], "resamples": 0, "seed": 0, "values": {"x": {}}}', "is no file of results"),
        ('{"prompts": ["a"], "resamples": 0, "seed": 0, "values": {}}', "prompts, seed or resamples differ"),
    ],
)
def test_folders_that_do_not_compare(tmp_path, content, message):
    for name in "ab":
        (tmp_path / name).mkdir()
        results(0).save(tmp_path / name / VALUES)
    (tmp_path / "b" / VALUES).write_text(content)
    with pytest.raises(ValueError, match=message):
        compare.main([str(tmp_path / "a"), str(tmp_path / "b")])

"""The benchmark of serving runs; its arrivals, quantiles and ratios are right."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_remote import Server, exported, running  # noqa: F401  a fixture

from unified.serving.remote import RemotePipeline

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "eval"))

from benchmark_serving import (  # noqa: E402
    arrivals,
    better,
    main,
    measure,
    measure_server,
    metrics,
    random_pipeline,
    serve,
)


@pytest.mark.process
def test_it_runs(tmp_path):
    main(["--requests", "3", "--rounds", "1", "--loads", "4", "--grid", "4", "--width", "64", "--layers", "1",
          "--max-rows", "4", "--threads", str(torch.get_num_threads()), "--json", str(tmp_path / "out.json")])  # fmt: skip
    result = json.loads((tmp_path / "out.json").read_text())
    (row,) = result["loads"]
    assert row["load"] == 4 and result["conditions"]["requests"] == 3
    for name in ("throughput", "p50", "p95"):
        assert row[name]["spread"][0] == row[name]["ratio"] == row[name]["spread"][1] > 0


def test_arrivals_are_a_poisson_process():
    times = np.array(arrivals(20_000, load=2.0, service=3.0, seed=0))
    gaps = np.diff(times)
    assert times[0] == 0 and gaps.mean() == pytest.approx(1.5, rel=0.03) and gaps.std() == pytest.approx(1.5, rel=0.03)
    assert arrivals(5, 2.0, 3.0, 1) == arrivals(5, 2.0, 3.0, 1) != arrivals(5, 2.0, 3.0, 2)


def test_metrics_and_ratios():
    """Two requests a second apart, answered after 2 s one by one, after 1 s by the engine."""
    alone, engine = metrics([0.0, 1.0], [2.0, 4.0]), metrics([0.0, 1.0], [1.0, 2.0])
    assert alone == {"throughput": 0.5, "p50": 2.5, "p95": pytest.approx(2.95)}
    result = better([alone, alone], [engine, alone])
    assert result["throughput"] == {"ratio": 1.5, "spread": [1.0, 2.0]} and result["p50"]["ratio"] == 1.75


def test_a_worker_answers_in_turn():
    drawn = []
    answered = serve(drawn.append, [0.0, 0.01, 0.02], workers=1)
    assert drawn == [0, 1, 2] and answered == sorted(answered) and answered[2] >= 0.02


@pytest.mark.process
def test_other_images_are_not_timed(monkeypatch):
    pipe = random_pipeline(4, 64, 1)
    call = type(pipe).__call__

    def other(self, **options):
        return call(self, **{**options, "generator": torch.Generator().manual_seed(99)})

    monkeypatch.setattr(type(pipe), "__call__", other)
    with pytest.raises(RuntimeError, match="request 0: the engine generates another image"):
        measure(pipe, [1.0], requests=6, max_rows=4, rounds=1)


@pytest.mark.process
def test_a_server_beside_the_engine(exported, monkeypatch):  # noqa: F811
    """The ratio is the engine's time by the server's, after a round that warms up; other codes are not timed."""
    pipe, folder = exported
    server, clock = Server(folder), iter([0.0, 1.0, 10.0, 12.0, 15.0])
    monkeypatch.setattr("benchmark_serving.time", SimpleNamespace(perf_counter=lambda: next(clock)))
    server.delay = 0.1
    with running(server) as url, RemotePipeline(folder, url, concurrency=8) as there:
        rows = measure_server(pipe, there, [2], 3, 1, guidance=1.0)
        assert rows == [{"concurrency": 2, "ratio": 1.5, "spread": [1.5, 1.5]}]
        assert len(server.bodies) == 6 + 2 * 3
        server.changes = {"token_ids": [server.about["first_code"]] * 16}
        with pytest.raises(RuntimeError, match="greedy codes are not the pipeline's"):
            measure_server(pipe, there, [1], 1, 1, guidance=1.0)

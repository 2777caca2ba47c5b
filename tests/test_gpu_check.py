"""The checks for a GPU, at tiny sizes on the CPU: what they compare, what they report, and that they can fail."""

import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "eval"))

import gpu_check  # noqa: E402
from gpu_check import (  # noqa: E402
    Row,
    check_attention,
    check_compiled,
    check_fine_tune,
    check_generators,
    check_precision,
    page,
    run,
)

TINY = {"codebook": 20, "text_vocab": 16, "width": 64, "layers": 1}


def test_checks_hold_on_a_cpu():
    rows = [
        *check_precision("cpu", steps=3, **TINY),
        *check_attention("cpu", kinds=["eager"], **TINY),
        *check_generators("cpu", grid=2, **TINY),
        *check_fine_tune("cpu", rounds=1, sizes=TINY),
    ]
    assert [row.passed for row in rows] == [True, True, True, True, True, None, None]
    assert rows[-2].measured == "100.0% equal" and float(rows[-1].measured) > 0


@pytest.mark.process
def test_the_compiler_is_checked():
    rows = check_compiled("cpu", 1, "eager", **TINY)
    assert [row.passed for row in rows] == [True, True, None]


def test_a_check_can_fail(monkeypatch):
    monkeypatch.setattr(gpu_check, "gradient", lambda model, loss: torch.randn(5))
    assert not any(row.passed for row in check_attention("cpu", kinds=["eager"], **TINY))


def test_a_failing_check_is_a_row_and_the_others_go_on():
    def broken():
        raise RuntimeError("no kernel\nmore")

    rows = run({"attention": broken, "memory": lambda: [Row("memory", "3 GB", "4 GB", None)]})
    assert rows == [Row("attention", "RuntimeError: no kernel", "", False), Row("memory", "3 GB", "4 GB", None)]
    assert page("A device", rows).splitlines()[4:] == [
        "| attention | RuntimeError: no kernel |  | **does not hold** |",
        "| memory | 3 GB | 4 GB | measured |",
    ]


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_without_a_gpu_it_ends_with_one_line(tmp_path, capsys):
    assert gpu_check.main(["--output", str(tmp_path / "page.md")]) == 1
    assert capsys.readouterr().err == "gpu-check: no CUDA device here, so nothing was checked\n"
    assert list(tmp_path.iterdir()) == []

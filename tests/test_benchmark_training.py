"""The benchmark of training compares losses before it times anything, and pairs what it times."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "eval"))


def test_losses_are_compared_with_the_reference(monkeypatch):
    import benchmark_training

    assert max(benchmark_training.check_losses().values()) < 1e-5
    monkeypatch.setattr(benchmark_training, "reference_loss", lambda *args: benchmark_training.torch.tensor(0.0))
    with pytest.raises(RuntimeError, match="loss differs from the reference"):
        benchmark_training.check_losses()


def test_memory_kept_for_the_backward_pass():
    """Activations alone: a quarter at p = 2, and the same whatever the size of the codebook."""
    import benchmark_training as b

    def kept(codebook, p):
        model = b.our_model(codebook=codebook, width=64, layers=1, grid=8)
        batch = b.batch_of(model, b.sequences_of(model, 4, 8), p)
        return b.saved_megabytes(model, lambda: model(**batch.inputs))

    assert kept(4096, 1) == pytest.approx(kept(64, 1), rel=1e-3)
    assert 3.3 < kept(64, 1) / kept(64, 2) < 4.0
    assert kept(64, 1) > 4 * 66 * (10 * 64 + 3 * 170) * 4 / 1e6, (
        "a layer keeps ten states and three inner ones at least"
    )


@pytest.mark.process
def test_packing_is_timed_on_equal_losses_only(monkeypatch):
    import benchmark_training as b

    small = {"codebook": 16, "text_vocab": 20, "width": 64, "layers": 1}
    result = b.packing(1, count=6, **small)
    assert result["real_share_padded"] < result["real_share_packed"] <= 1
    lengths = [len(sequence.input_ids) for sequence in b.mixed_lengths(b.our_model(**small), 6)]
    assert result["real_share_padded"] == round(sum(lengths) / (6 * max(lengths)), 3)

    make = b.batch_of

    def mixed_up(*arguments):
        batch = make(*arguments)
        batch.inputs.pop("document_ids", None)
        return batch

    monkeypatch.setattr(b, "batch_of", mixed_up)
    with pytest.raises(RuntimeError, match=r"packed loss .* differs from the padded one .* at p = 1"):
        b.packing(1, count=6, **small)

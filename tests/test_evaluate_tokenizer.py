"""Metrics of image tokenizers: structural similarity, code statistics, the script."""

import json
import math
import re
import sys

import pytest
import torch
from PIL import Image
from torchmetrics.functional.image import structural_similarity_index_measure

from unified.data import load_source
from unified.errors import explain_errors
from unified_eval.structural import code_statistics, ssim
from unified_tokenizers import VQGAN, VQGANConfig

sys.path.append("eval")
import evaluate_tokenizer

pytestmark = pytest.mark.process


def test_ssim_equals_torchmetrics():
    generator = torch.Generator().manual_seed(0)
    a = torch.rand(3, 3, 24, 30, generator=generator)
    b = (a + 0.2 * torch.randn(a.shape, generator=generator)).clamp(0, 1)
    # torchmetrics pads by reflection and averages windows that reach over the edge, too; whole ones are compared here.
    _, whole = structural_similarity_index_measure(
        b.double(), a.double(), data_range=1.0, reduction="none", return_full_image=True
    )
    torch.testing.assert_close(ssim(a, b), whole[..., 5:-5, 5:-5].mean((1, 2, 3)), rtol=0, atol=1e-6)
    assert torch.equal(ssim(a, a), torch.ones(3, dtype=torch.float64))


def test_code_statistics_by_hand():
    found = code_statistics(torch.tensor([2, 2, 2, 2, 0, 0, 0, 0, 0, 0]), downsample=4)
    assert found["codes_used"] == 0.4 and math.isclose(found["perplexity"], 4)
    assert found["bits_per_pixel"] == 4 / 16 and math.isclose(found["entropy_bits_per_pixel"], 2 / 16)
    assert code_statistics(torch.tensor([5, 0, 0, 0, 0, 0, 0, 0]), 2)["perplexity"] == 1


@pytest.mark.parametrize(("call", "message"), [
    (lambda: ssim(torch.zeros(1, 3, 8, 16), torch.zeros(1, 3, 8, 16)), "11 or more pixels"),
    (lambda: ssim(torch.zeros(1, 3, 16, 16), torch.full((1, 3, 16, 16), 2.0)), "b: values leave"),
    (lambda: code_statistics(torch.zeros(4, dtype=torch.long), 2), "counts: no code was counted"),
])  # fmt: skip
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.fixture
def arguments(image_tokenizer, picture_source, tmp_path, monkeypatch):
    torch.manual_seed(0)
    image_tokenizer.save_pretrained(tmp_path / "small")
    VQGAN(VQGANConfig(channels=32, multipliers=[1, 1, 1, 1], residual_blocks=1, attention_levels=[], latent_channels=8,
                      codebook_size=16, code_dim=4)).save_pretrained(tmp_path / "big")  # fmt: skip

    def use(*more):
        command = ["evaluate_tokenizer.py", "--tokenizers", tmp_path / "small", tmp_path / "big", "--data", picture_source,
                   "--batch-size", 4, "--out", tmp_path / "out", *more]  # fmt: skip
        monkeypatch.setattr(sys, "argv", list(map(str, command)))
        return tmp_path / "out"

    return use


def test_script(arguments, image_tokenizer, picture_source, capsys):
    out = arguments("--image-size", 16, "--sheet", 2)
    evaluate_tokenizer.main()
    result = json.loads((out / "metrics.json").read_text())
    assert list(result["tokenizers"]) == ["small", "big"]
    small = result["tokenizers"]["small"]
    assert small["fingerprint"] == image_tokenizer.fingerprint and small["stride"] == 4
    from unified_eval import psnr_summary, reconstruct

    images = list(load_source(picture_source, "validation")["image"])
    assert small["metrics"]["psnr_db"] == pytest.approx(
        psnr_summary(images, reconstruct(image_tokenizer, images))["mean_db"]
    )
    assert (
        small["metrics"]["bits_per_pixel"] == 5 / 16
        and result["tokenizers"]["big"]["metrics"]["bits_per_pixel"] == 4 / 64
    )
    assert small["metrics"]["rfd_efflite0"] > 0 and small["metrics"]["encode_images_per_second"] > 0
    assert result["recipe"]["n"] == 6 and "lpips" not in small["metrics"]
    table = (out / "table.md").read_text()
    assert "| | small | big |" in table and "| codebook_size | 20 | 16 |" in table and table in capsys.readouterr().out
    assert Image.open(out / "reconstructions.png").width > 3 * 128


def test_metrics_do_not_depend_on_the_batches(arguments):
    """They are sums over a stream, whose last batch may be shorter."""
    found = []
    for size in (2, 4, 6):
        out = arguments("--image-size", 16, "--batch-size", size)
        evaluate_tokenizer.main()
        metrics = json.loads((out / "metrics.json").read_text())["tokenizers"]["big"]["metrics"]
        found.append({name: value for name, value in metrics.items() if "per_second" not in name})
    assert found[0] == pytest.approx(found[1], rel=1e-4) and found[0] == pytest.approx(found[2], rel=1e-4)


def test_a_size_that_does_not_divide_is_named(arguments):
    arguments("--image-size", 12)
    with pytest.raises(ValueError, match="image_size: 12 does not divide by the stride 8 of 'big'"):
        evaluate_tokenizer.main()


def test_a_mistake_is_one_line(arguments, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for message, *wrong in (
        ("out: '.*file' is a file; choose another folder", "--out", tmp_path / "file"),
        (r"--names: need 2 different ones, got \['a', 'a'\]", "--names", "a", "a"),
        ("max_samples: 0 is below 1", "--max-samples", 0),
    ):
        arguments("--image-size", 16, *wrong)
        with pytest.raises(SystemExit) as ended:
            explain_errors(evaluate_tokenizer.main)
        lines = capsys.readouterr().err.splitlines()
        assert ended.value.code == 2 and re.match(f"evaluate_tokenizer.py: {message}", lines[-1])

    def fail():
        raise ValueError("field: two\n  lines")

    with pytest.raises(SystemExit, match="2"):
        explain_errors(fail)
    assert capsys.readouterr().err == "evaluate_tokenizer.py: field: two lines\n"
    with pytest.raises(KeyError):  # a fault of the program keeps its traceback
        explain_errors(lambda: {}["absent"])

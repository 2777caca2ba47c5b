"""The pipeline's surroundings: dtype, device, progress bar, several grids, sample sheets of a training run."""

import copy
from types import SimpleNamespace

import pytest
import torch
from conftest import full_forward, generators
from PIL import Image

from unified import UnifiedPipeline
from unified.training.config import SampleConfig
from unified.training.tracking import RunLog
from unified_tokenizers.images import to_tensor


def test_bfloat16(pipeline, tmp_path):
    """Loaded and moved, the model is in bfloat16, the image tokenizer is not, and what it samples are codes."""
    pipeline.save_pretrained(tmp_path)
    loaded = UnifiedPipeline.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    loaded.set_progress_bar_config(disable=True)
    assert {p.dtype for p in loaded.model.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in loaded.image_tokenizer.parameters()} == {torch.float32}
    output = loaded("red apple", generator=generators(0), output_type="pt")
    assert output.codes.dtype == torch.int64 and output.codes.min() >= 0 and output.codes.max() < 20
    assert torch.equal(output.images, loaded.image_tokenizer.decode(output.codes) / 2 + 0.5)
    assert pipeline.to(torch.bfloat16) is pipeline
    assert torch.equal(pipeline("red apple", generator=generators(0)).codes, output.codes)
    back = pipeline.to("cpu", torch.float32).model
    assert {p.dtype for p in back.parameters()} == {torch.float32}


def test_moving_renews_the_kept_decoder(pipeline):
    """And takes the image tokenizer along."""
    pipeline.enable_fast_decoding()
    kept = pipeline.decoder()
    pipeline.to(torch.bfloat16)
    assert pipeline.decoder() is not kept
    slow = pipeline("red apple", generator=generators(0)).codes
    pipeline.disable_fast_decoding()
    assert torch.equal(pipeline("red apple", generator=generators(0)).codes, slow)
    moved = UnifiedPipeline(pipeline.model, copy.deepcopy(pipeline.image_tokenizer), pipeline.text_tokenizer)
    moved.to("meta")
    assert {p.device.type for p in (*moved.model.parameters(), *moved.image_tokenizer.parameters())} == {"meta"}


@pytest.mark.parametrize("decoding", ["plain", "jacobi"])
def test_progress_bar_counts_codes(pipeline, capsys, decoding):
    pipeline("red apple", num_images_per_prompt=2)
    assert capsys.readouterr().err == ""  # the fixture has switched it off
    pipeline.set_progress_bar_config(desc="sampling", mininterval=0)
    pipeline("red apple", num_images_per_prompt=2, decoding=decoding)
    error = capsys.readouterr().err
    assert error.rstrip().splitlines()[-1].startswith("sampling") and "32/32" in error and "code" in error


def test_every_trained_grid_is_generated(pipeline, image_tokenizer):
    """The second one, wider than high: the likeliest codes by one full forward pass each."""
    pipeline.model.config.image_grids = [[4, 4], [2, 6]]
    assert pipeline.default_size == (16, 16)
    vocabulary, codes = pipeline.model.config.vocabulary, []
    prompt = [vocabulary.bos_token_id, *pipeline.text_tokenizer.encode("red apple"), vocabulary.boi_token_id]
    for step in range(12):
        rest = [vocabulary.text_vocab_size + c for c in [*codes, *[0] * (12 - step)]]  # what is to come is not seen
        with torch.no_grad():
            output = full_forward(pipeline.model, prompt + rest, [(2, 6)])
        codes.append(int(output.image_logits[0, len(prompt) - 1 + step].argmax()))
    output = pipeline("red apple", height=8, width=24, guidance_scale=1.0, top_k=1)
    assert output.codes.tolist() == [[codes[:6], codes[6:]]] and output.images[0].size == (24, 8)
    with pytest.raises(ValueError, match=r"height, width: 24x8 is not a size .* \(16x16, 8x24\)"):
        pipeline("red apple", height=24, width=8)
    # And read: an edit that keeps all of it.
    mask = Image.new("L", (24, 8))
    kept = pipeline.inpaint("red apple", output.images[0], mask).codes
    assert torch.equal(kept, image_tokenizer.encode(to_tensor(output.images)))


def test_sample_sheets_show_the_images(pipeline, tmp_path):
    log = RunLog(SimpleNamespace(is_main_process=True, trackers=[]), tmp_path, 0)
    log.samples(7, pipeline, SampleConfig(prompts=["red apple", "blue car"], guidance_scale=2.0, seed=5))
    sheet = Image.open(tmp_path / "samples" / "step-00000007.png")
    expected = pipeline("blue car", guidance_scale=2.0, generator=generators(6)).images[0]
    assert sheet.crop((20, 2, 36, 18)).tobytes() == expected.tobytes()
    assert sheet.getpixel((0, 0)) == (255, 255, 255)

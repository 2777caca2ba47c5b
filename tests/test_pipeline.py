"""The pipeline: images from prompts, formats, folders, errors."""

import json

import numpy as np
import pytest
import torch
from conftest import generators, tiny_model

from unified import UnifiedPipeline
from unified_tokenizers import VQConfig, VQModel
from unified_tokenizers.images import to_tensor

PROMPTS = ["red apple", "a cat and a dog"]


def test_same_seed_same_image_whatever_the_batch(pipeline):
    both = pipeline(PROMPTS, generator=generators(1, 2)).codes
    assert torch.equal(pipeline(PROMPTS[1], generator=generators(2)).codes[0], both[1])
    four = pipeline(PROMPTS, num_images_per_prompt=2, generator=generators(1, 7, 2, 8)).codes
    assert torch.equal(four[0], both[0]) and torch.equal(four[2], both[1])
    assert not torch.equal(four[0], four[1])


def test_one_generator_seeds_all(pipeline):
    first = pipeline(PROMPTS, generator=torch.Generator().manual_seed(5)).codes
    again = pipeline(PROMPTS, generator=torch.Generator().manual_seed(5)).codes
    assert torch.equal(first, again) and not torch.equal(first[0], first[1])


def test_output_types_agree(pipeline):
    outputs = {
        kind: pipeline("red apple", generator=generators(0), output_type=kind) for kind in ("pil", "np", "pt", "codes")
    }
    image = pipeline.image_tokenizer.decode(outputs["codes"].images)
    # As in diffusers: floats in [0, 1], channels first in torch and last in numpy.
    assert torch.equal(outputs["pt"].images, image / 2 + 0.5)
    assert outputs["np"].images.dtype == np.float32 and outputs["np"].images.shape == (1, 16, 16, 3)
    assert np.array_equal(outputs["np"].images, outputs["pt"].images.movedim(1, -1).numpy())
    assert np.array_equal((outputs["np"].images[0] * 255).round(), np.asarray(outputs["pil"].images[0]))
    assert outputs["pil"].images[0].size == (16, 16)
    torch.testing.assert_close(to_tensor(outputs["pil"].images), image, rtol=0, atol=1 / 255 + 1e-6)


def test_guidance_and_negative_prompt_matter(pipeline):
    codes = {
        name: pipeline("red apple", generator=generators(0), **options).codes
        for name, options in {"off": {"guidance_scale": 1.0}, "on": {"guidance_scale": 5.0},
                              "negative": {"guidance_scale": 5.0, "negative_prompt": "blue car"}}.items()
    }  # fmt: skip
    assert not torch.equal(codes["off"], codes["on"]) and not torch.equal(codes["on"], codes["negative"])


def test_callback_counts_the_codes(pipeline):
    steps = []
    pipeline(
        "red apple",
        callback_on_step_end=lambda p, i, t, tensors: steps.append((p is pipeline, i, t, tensors["codes"].shape[1])),
    )
    assert steps == [(True, i, i, i + 1) for i in range(16)]


def test_folder_round_trip(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path, card="---\nlicense: mit\n---\n# Grün\n")
    assert json.loads((tmp_path / "pipeline.json").read_text())["_class_name"] == "UnifiedPipeline"
    suffixes = {path.suffix for path in tmp_path.rglob("*") if path.is_file()}
    assert suffixes == {".json", ".safetensors", ".model", ".md"}
    assert (tmp_path / "README.md").read_text(encoding="utf-8") == "---\nlicense: mit\n---\n# Grün\n"
    loaded = UnifiedPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert torch.equal(
        loaded(PROMPTS, generator=generators(1, 2)).codes, pipeline(PROMPTS, generator=generators(1, 2)).codes
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": ""}, "prompt: '' is not a caption"),
        ({"prompt": ["red apple", "  "]}, "prompt: '  ' is not a caption"),
        ({"prompt": 3}, "prompt: 3 is not a caption"),
        ({"prompt": []}, r"prompt: \[\] is not a caption"),
        ({"prompt": "red apple " * 100}, "the model has room for 110 beside the image"),
        (
            {"prompt": "red apple", "height": 32},
            "height, width: 32x16 is not a size that the model was trained on .16x16.",
        ),
        ({"prompt": "red apple", "width": 15}, "height, width: 16x15"),
        ({"prompt": "red apple", "output_type": "jpg"}, "output_type: 'jpg'"),
        ({"prompt": "red apple", "num_images_per_prompt": 0}, "num_images_per_prompt: 0"),
        ({"prompt": PROMPTS, "negative_prompt": ["a", "b", "c"]}, "negative_prompt: 3 given for 2 prompts"),
        ({"prompt": PROMPTS, "generator": generators(0)}, "generator: 1 given for 2 images"),
    ],
)
def test_bad_arguments_are_named(pipeline, arguments, message):
    with pytest.raises(ValueError, match=message):
        pipeline(**arguments)


def test_parts_must_belong_together(pipeline, image_tokenizer, text_tokenizer):
    torch.manual_seed(1)
    other = VQModel(VQConfig(channels=8, encoder_blocks=1, decoder_blocks=1, codebook_size=20, code_dim=4)).eval()
    with pytest.raises(ValueError, match=f"image_tokenizer: fingerprint {other.fingerprint} is not the one"):
        UnifiedPipeline(pipeline.model, other, text_tokenizer)
    with pytest.raises(ValueError, match=rf"text_tokenizer: {text_tokenizer.vocab_size} ids, the model has 50"):
        UnifiedPipeline(tiny_model(), image_tokenizer, text_tokenizer)
    with pytest.raises(ValueError, match="image_tokenizer: 20 codes, the model has 30"):
        UnifiedPipeline(tiny_model(codebook_size=30), image_tokenizer, text_tokenizer)


def test_missing_folder_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"pipeline: '.*nothing' does not exist"):
        UnifiedPipeline.from_pretrained(tmp_path / "nothing")
    with pytest.raises(ValueError, match=r"has no pipeline.json"):
        UnifiedPipeline.from_pretrained(tmp_path)

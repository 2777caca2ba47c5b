"""What the pipeline refuses, and how it says so; where the limits are."""

import pytest
import torch
from conftest import generators, noisy_adapter, tiny_model

from unified.decoding import Sampling

PROMPTS = ["red apple", "a cat and a dog"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": 3}, "prompt: 3 is not a caption"),
        ({"prompt": ["red apple", 3]}, "prompt: 3 is not a caption"),
        ({"prompt": "red apple", "negative_prompt": 3}, "negative_prompt: 3 is not a string"),
        ({"prompt": "red apple", "temperature": "hot"}, "temperature: 'hot' is not a finite number"),
        ({"prompt": "red apple", "guidance_scale": float("nan")}, "guidance_scale: nan is not a finite number"),
        ({"prompt": "red apple", "group_temperature": 0}, "group_temperature: 0 times the temperature of 1.0 must be"),
        ({"prompt": "red apple", "group_temperature": 0.01, "temperature": 0.001}, "group_temperature: 0.01 times"),
        ({"prompt": "red apple", "group_temperature": "1"}, "group_temperature: '1' is not a finite number"),
        ({"prompt": "red apple", "guidance_schedule": "up"}, "guidance_schedule: 'up' is unknown"),
        ({"prompt": "red apple", "guidance_schedule": lambda share: share}, "guidance_schedule: falls to 0.0"),
        ({"prompt": "red apple", "height": 16.0}, "height: 16.0 must be a whole number"),
        ({"prompt": "red apple", "num_images_per_prompt": 1.5}, "num_images_per_prompt: 1.5"),
        ({"prompt": "red apple", "generator": 7.0}, "generator: 7.0 is not a torch.Generator or a seed"),
        ({"prompt": "red apple", "generator": True}, "generator: True is not a torch.Generator or a seed"),
        (
            {"prompt": "red apple", "generator": 2**64},
            "generator: 18446744073709551616 is not a torch.Generator or a seed",
        ),
        ({"prompt": "red apple", "generator": ["7"]}, "generator: '7' is not a torch.Generator or a seed"),
        ({"prompt": "red apple", "decoding": "fast"}, "decoding: 'fast' is unknown"),
        ({"prompt": "red apple", "known": torch.zeros(1, 2, 2).long()}, r"known: shape \(1, 2, 2\), need \(N, 4, 4\)"),
        ({"prompt": "red apple", "known": torch.zeros(3, 4, 4).long()}, "known: 3 given for 1 images"),
        ({"prompt": PROMPTS, "known": torch.zeros(3, 4, 4).long()}, "known: 3 given for 2 images of 2 prompts"),
        ({"prompt": "red apple", "known": torch.zeros(1, 4, 4)}, "known: torch.float32 is not a tensor of integer"),
        ({"prompt": "red apple", "known": torch.zeros(1, 4, 4) > 0}, "known: torch.bool is not a tensor of integer"),
        ({"prompt": "red apple", "known": [[[0] * 4] * 4]}, "known: list is not a tensor of integer codes"),
        ({"prompt": "red apple", "callback_on_step_end": 3}, "callback_on_step_end: 3 is not a function"),
        ({"prompt": "red apple", "negative_prompt": "car " * 200}, "negative_prompt: .* the model has room for 110"),
        ({"prompt": "red apple", "top_k": 2.5}, "top_k: 2.5 must be a whole number"),
        ({"prompt": "red apple", "guidance_schedule": lambda share: None}, "guidance_schedule: None is not a finite"),
        ({"prompt": "red apple", "guidance_schedule": lambda share: 1e999}, "guidance_schedule: inf is not a finite"),
        ({"prompt": "red apple", "known": torch.full((1, 4, 4), 20)}, r"known: values 20..20 leave the codebook"),
    ],
)
def test_bad_arguments_are_named(pipeline, arguments, message):
    with pytest.raises(ValueError, match=message):
        pipeline(**arguments)
    with pytest.raises(ValueError, match=message):
        next(iter(pipeline.stream(**arguments)))


def test_bad_images_and_messages_are_named(pipeline, photo):
    with pytest.raises(ValueError, match="mask_image: 8x8 pixels, the image has 16x16"):
        pipeline.inpaint("red apple", photo, photo.resize((8, 8)))
    with pytest.raises(ValueError, match="mask_image: 2 masks for 1 images"):
        pipeline.inpaint("red apple", photo, [photo, photo])
    with pytest.raises(ValueError, match=r"image: 32x32 is not a size that the model was trained on \(16x16\)"):
        pipeline.variation("red apple", photo.resize((32, 32)))
    with pytest.raises(ValueError, match=r"keep: 1.5 is not a share"):
        pipeline.variation("red apple", photo, keep=1.5)
    with pytest.raises(ValueError, match=r"mask_image: None is not a PIL image"):
        pipeline.inpaint("red apple", photo, None)
    with pytest.raises(ValueError, match="image: 2 given for 3 images of 1 prompts"):
        pipeline.inpaint("red apple", [photo, photo], [photo, photo], num_images_per_prompt=3)
    for name in ("height", "width", "known"):
        with pytest.raises(ValueError, match=f"{name}: an edit takes it from the image; leave it out"):
            pipeline.variation("red apple", photo, **{name: 16})
    for options in ({"keep": 0.5}, {"image": photo}, {"image": photo, "mask_image": photo, "keep": 0.5}):
        with pytest.raises(ValueError, match="image: goes with mask_image to inpaint, or with keep for a variation"):
            next(iter(pipeline.stream("red apple", **options)))
    with pytest.raises(ValueError, match=r"images: 'photo.png' is not a PIL image"):
        pipeline.caption("photo.png")
    for prompt in ("", 3, ["a"]):
        with pytest.raises(ValueError, match=r"prompt: .* is not a caption"):
            pipeline.caption(photo, prompt=prompt)
    for name in ("text_sampling", "image_sampling"):
        with pytest.raises(ValueError, match=f"{name}: 0.5 is not a unified.decoding.Sampling"):
            pipeline.chat(["red apple"], **{name: 0.5})
    with pytest.raises(ValueError, match=r"messages: \[\] is not a conversation"):
        pipeline.chat([])
    with pytest.raises(ValueError, match="messages: 3 is neither a text nor a PIL image"):
        pipeline.chat(["red apple", 3])
    with pytest.raises(ValueError, match="max_new_tokens: 0 must be a whole number of at least 1"):
        pipeline.chat(["red apple"], max_new_tokens=0)
    with pytest.raises(ValueError, match=r"messages: .* tokens and up to 518 new ones, the model has room for 128"):
        pipeline.chat(["red apple"], max_new_tokens=500)
    with pytest.raises(ValueError, match=r"preview_every: 0.5"):
        next(iter(pipeline.stream("red apple", preview_every=0.5)))


def test_broken_weights_are_named(pipeline):
    with torch.no_grad():
        pipeline.model.image_head.weight[3] = float("nan")
    for decoding in ("plain", "sjd"):
        with pytest.raises(ValueError, match="logits: NaN"):
            pipeline("red apple", decoding=decoding)


def test_adapter_of_another_model_is_refused(pipeline, tmp_path):
    noisy_adapter(tiny_model(), tmp_path, 0)
    with pytest.raises(ValueError, match="was made for another model"):
        pipeline.load_lora_weights(tmp_path)


def test_limits_are_exact(pipeline):
    """A prompt that just fits is generated as in a model with more room; one token more is refused."""
    tokenizer, limits, room = pipeline.text_tokenizer, pipeline.model.config.text_config, 128 - 16 - 2
    full = "q" * (room - len(tokenizer.encode("q")) + 1)  # not in the vocabulary: one byte, one token
    assert len(tokenizer.encode(full)) == room == len(tokenizer.encode(full + "q")) - 1
    sample = lambda: pipeline(full, negative_prompt=full, generator=generators(0)).codes  # noqa: E731
    codes = sample()
    limits.max_position_embeddings = 256
    assert torch.equal(sample(), codes)
    limits.max_position_embeddings = 128
    for name, texts in (("prompt", (full + "q", "car")), ("negative_prompt", ("car", full + "q"))):
        with pytest.raises(ValueError, match=f"^{name}: {room + 1} tokens, the model has room for {room} beside"):
            pipeline(texts[0], negative_prompt=texts[1])


def test_whole_numbers_as_floats(pipeline):
    assert type(Sampling(top_k=2.0).top_k) is int
    codes = [pipeline("red apple", top_k=k, generator=generators(0)).codes for k in (2, 2.0)]
    assert torch.equal(*codes)
    known = codes[0].to(torch.int16)
    assert torch.equal(pipeline("red apple", known=known).codes, codes[0])

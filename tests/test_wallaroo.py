"""Wallaroo: logits and images equal those of transformers' Qwen2.5-VL with the published networks around it, and it trains."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from published import TEXT, byte_tokenizer, check_training, generated, image_loss, randomize, reloaded
from torch import nn
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

import convert_checkpoint
from unified import UnifiedPipeline
from unified.convert.wallaroo import ADDED, BOI, LINE_END, wallaroo_pipeline
from unified_tokenizers import VQGAN, VQGANConfig

pytestmark = pytest.mark.process
CODES, GRID, WIDTH = 40, (3, 4), 64


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """A checkpoint as it is published, the model that it was trained from, and the image tokenizer; random weights."""
    folder = tmp_path_factory.mktemp("wallaroo")
    tokenizer = byte_tokenizer("<|im_start|>", "<|im_end|>", bos=None, eos="<|endoftext|>")
    sizes = {name: value for name, value in TEXT.items() if name != "initializer_range"}
    config = Qwen2_5_VLConfig(
        text_config={**sizes, "vocab_size": 330, "rope_theta": 1000000.0,
                     "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0, "mrope_section": [2, 3, 3]}},
        vision_config={"depth": 1, "hidden_size": 32, "num_heads": 2, "intermediate_size": 32, "out_hidden_size": WIDTH},
        tie_word_embeddings=False,
    )  # fmt: skip
    model = randomize(Qwen2_5_VLForConditionalGeneration(config), 0.2)
    torch.manual_seed(2)
    read = nn.Sequential(nn.Linear(8, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH))
    scores = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, CODES, bias=False))
    state = {f"gen_input_adpater.{name}": value for name, value in read.state_dict().items()}
    state |= {f"gen_image_head.{name}": value * 3 for name, value in scores.state_dict().items()}
    state |= {f"edit_image_head.{name}": value for name, value in scores.state_dict().items()}
    state["wallaroo.lm_head.weight"] = model.lm_head.weight.detach()
    for name, value in model.model.language_model.state_dict().items():
        state[f"wallaroo.model.{name}"] = value
    for name, value in model.model.visual.state_dict().items():
        state[f"wallaroo.visual.{name}"] = value
    torch.save({"global_step": 7, "state_dict": state}, folder / "checkpoint.ckpt")
    config.save_pretrained(folder / "backbone")
    tokenizer.save_pretrained(folder / "backbone")
    tokenizer.add_tokens(list(ADDED))
    scores.load_state_dict({name: value * 3 for name, value in scores.state_dict().items()})
    images = VQGAN(
        VQGANConfig(channels=32, multipliers=[1, 1], residual_blocks=1, attention_levels=[], latent_channels=8,
                    codebook_size=CODES, code_dim=8)
    )  # fmt: skip
    images.save_pretrained(folder / "images")
    return SimpleNamespace(folder=folder, tokenizer=tokenizer, images=images, model=model, read=read, scores=scores)


def converted(parts):
    """Its pipeline, for a small grid that passes for 352 x 352 pixels in the prompts."""
    pipe = wallaroo_pipeline(*(parts.folder / name for name in ("checkpoint.ckpt", "images", "backbone")))
    config = pipe.model.config
    config.image_grids = [list(GRID)]
    for name in ("prompt_template", "null_prompt"):
        setattr(config, name, getattr(config, name).replace("{height}", "352").replace("{width}", "352"))
    return pipe


def prompt_ids(parts, caption):
    """A prompt as the published script writes it."""
    request = f'Generate an image with resolution 352x352 based on the prompt: "{caption}"'
    text = f"<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n{request}<|im_end|>\n"
    encode = parts.tokenizer.encode
    return [*encode(text + " <indicator:352><indicator:352>"), *encode(f"<|im_start|>assistant\n{BOI}")]


def hidden(parts, ids, codes):
    """Final states of a prompt and the codes behind it, with a token between rows, and where the states of codes are."""
    vectors = F.normalize(parts.images.quantize.embedding.weight, dim=-1)
    embed = parts.model.get_input_embeddings()
    line_end = torch.tensor([parts.tokenizer.convert_tokens_to_ids(LINE_END)])
    rows, places = [embed(torch.tensor(ids))], []
    for index, code in enumerate(codes):
        if index and index % GRID[1] == 0:
            rows.append(embed(line_end))
        places.append(sum(map(len, rows)) - 1)
        rows.append(parts.read(vectors[code][None]))
    if codes and len(codes) % GRID[1] == 0:
        rows.append(embed(line_end))
    found = parts.model.model.language_model(inputs_embeds=torch.cat(rows)[None]).last_hidden_state[0]
    return found, places


@torch.no_grad()
def greedy(parts, scale=3.0):
    codes = []
    while len(codes) < GRID[0] * GRID[1]:
        one, two = (
            parts.scores(hidden(parts, prompt_ids(parts, caption), codes)[0][-1]) for caption in ("red apple", "")
        )
        codes.append(int((two + scale * (one - two)).argmax()))
    return torch.tensor(codes)


def test_images_are_those_of_the_published_loop(parts, tmp_path):
    pipe = reloaded(converted(parts), tmp_path)
    found = pipe("red apple", top_k=1, output_type="codes").codes
    assert torch.equal(found.flatten(), greedy(parts)) and len(found.unique()) > 4
    assert generated(tmp_path, tmp_path / "out").size == (8, 6)


@torch.no_grad()
def test_logits_and_loss(parts):
    pipe, codes = converted(parts), torch.randint(0, CODES, GRID, generator=torch.Generator().manual_seed(3))
    states, places = hidden(parts, prompt_ids(parts, "red apple"), codes.flatten().tolist())
    wanted = F.cross_entropy(parts.scores(states[places]), codes.flatten())
    torch.testing.assert_close(image_loss(pipe, codes), wanted, rtol=0, atol=1e-4)


def test_it_trains(parts):
    check_training(converted(parts))


def test_the_script_writes_a_pipeline(parts, tmp_path, capsys):
    given = {"checkpoint": "checkpoint.ckpt", "image-tokenizer": "images", "backbone": "backbone"}
    arguments = [each for name, file in given.items() for each in (f"--{name}", str(parts.folder / file))]
    convert_checkpoint.main(["wallaroo", *arguments, "--out", str(tmp_path)])
    assert "a pipeline, 512x512 pixels an image" in capsys.readouterr().out
    pipe = UnifiedPipeline.from_pretrained(tmp_path)
    assert (
        pipe.model.config.code_pixels == 2
        and "<indicator:{height}><indicator:{width}>" in pipe.model.config.null_prompt
    )
    assert len(pipe.model.config.image_grids) == 19
    assert pipe.sampling == {"guidance_scale": 3.0, "temperature": 1.0, "top_k": 1000, "top_p": 1.0}


def test_bad_use_is_named(parts, tmp_path):
    folder = parts.folder
    with pytest.raises(ValueError, match=r"backbone: .* is a 'unified_vqgan' model, not a Qwen2\.5-VL one"):
        wallaroo_pipeline(folder / "checkpoint.ckpt", folder / "images", folder / "images")
    VQGAN(
        VQGANConfig(channels=32, multipliers=[1], residual_blocks=1, attention_levels=[], latent_channels=8,
                    codebook_size=CODES + 1, code_dim=8)
    ).save_pretrained(tmp_path)  # fmt: skip
    with pytest.raises(ValueError, match="image_tokenizer: 41 codes of 8 numbers, the model reads 40 of 8"):
        wallaroo_pipeline(folder / "checkpoint.ckpt", tmp_path, folder / "backbone")

"""Lumina-mGPT 2.0: logits and images equal those of transformers' Chameleon with the published layout, its image tokenizer those
of an independent MoVQ, and it trains.
"""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from published import TEXT, byte_tokenizer, check_training, generated, image_loss, randomize, reloaded
from transformers import ChameleonConfig, ChameleonForConditionalGeneration

import convert_checkpoint
from unified import UnifiedPipeline
from unified.convert.lumina import BOI, END_OF_TURN, EOI, ROW_END, grids_token, lumina_pipeline
from unified_tokenizers import VQGAN, AutoImageTokenizer, VQGANConfig

pytestmark = pytest.mark.process
CODES, SIDE = 40, 4  # 32 pixels at stride 8


def published_name(name):
    """A tensor's name in MoVQGAN's file."""
    middle = {"0": "block_1", "1": "attn_1", "2": "block_2"}
    parts = name.split(".")
    if parts[1] == "mid":
        parts[2] = middle[parts[2]]
    elif parts[1] == "conv_blocks":
        parts[1], parts[2] = ("down", parts[2]) if parts[0] == "encoder" else ("up", str(3 - int(parts[2])))
        parts[3] = {"res": "block"}.get(parts[3], parts[3])
    return ".".join(parts)


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """A language model and an image tokenizer as they are published, with random weights."""
    folder = tmp_path_factory.mktemp("lumina")
    torch.manual_seed(1)
    images = randomize(
        VQGAN(VQGANConfig(channels=32, multipliers=[1, 1, 1, 2], residual_blocks=1, attention_levels=[3], latent_channels=4,
                          codebook_size=CODES, code_dim=4, normalize_codes=False, spatial_norms=True))
    )  # fmt: skip
    state = {published_name(name): value for name, value in images.state_dict().items()}
    torch.save({**state, "loss.perceptual.weight": torch.zeros(1)}, folder / "movqgan.ckpt")
    tokenizer = byte_tokenizer(
        BOI, EOI, END_OF_TURN, ROW_END, "<image>", *map(grids_token, range(1, 25)), bos=None, eos="<|end|>"
    )
    tokenizer.save_pretrained(folder / "language")
    first = len(tokenizer) + 3
    model = ChameleonForConditionalGeneration(
        ChameleonConfig(vocab_size=first + CODES + 2, vocabulary_map=tokenizer.get_added_vocab(), tie_word_embeddings=False, **TEXT,
                        vq_config={"base_channels": 32, "channel_multiplier": [1], "num_res_blocks": 1})
    )  # fmt: skip
    with torch.no_grad():
        for layer in randomize(model, 0.05).model.layers:
            for norm in (layer.self_attn.q_norm, layer.self_attn.k_norm):
                norm.weight.add_(1.0)
    model.save_pretrained(folder / "language")
    return SimpleNamespace(folder=folder, model=model, tokenizer=tokenizer, first=first, images=images, state=state)


def converted(parts):
    return lumina_pipeline(parts.folder / "language", parts.folder / "movqgan.ckpt", pixels=32, first_code=parts.first)


def prompts(parts):
    """A prompt and what it is steered away from, as the published solver makes them."""
    frame = f"{BOI}{grids_token(1)}{grids_token(1)}"
    text = f"<|end|>Generate an image of 32x32 according to the following prompt:\nred apple{END_OF_TURN}"
    return [parts.tokenizer.encode(each, add_special_tokens=False) for each in (text + frame, frame)]


@torch.no_grad()
def scores_of(parts, row, codes):
    """Scores of codes ``(positions, K)`` at a row's last positions: behind its prompt and behind all that follows."""
    row_end = parts.tokenizer.convert_tokens_to_ids(ROW_END)
    after = []
    for index, code in enumerate(codes, 1):
        after += [parts.first + code, *([row_end] if index % SIDE == 0 else [])]
    states = parts.model.model(torch.tensor([row + after])).last_hidden_state[0, len(row) - 1 :]
    return parts.model.lm_head(states)[:, parts.first : parts.first + CODES]


def test_images_are_those_of_the_published_loop(parts, tmp_path):
    pipe = reloaded(converted(parts), tmp_path)
    codes = []
    while len(codes) < SIDE**2:
        one, two = (scores_of(parts, row, codes)[-1] for row in prompts(parts))
        codes.append(int((two + 4.0 * (one - two)).argmax()))
    found = pipe("red apple", top_k=1, output_type="codes").codes
    assert found.flatten().tolist() == codes and len(set(codes)) > 4
    assert generated(tmp_path, tmp_path / "out").size == (32, 32)


def test_logits_and_loss(parts):
    pipe, codes = converted(parts), torch.randint(0, CODES, (SIDE, SIDE), generator=torch.Generator().manual_seed(3))
    found = scores_of(parts, prompts(parts)[0], codes.flatten().tolist())
    wanted = F.cross_entropy(found[[i for i in range(20) if i % 5 < 4]], codes.flatten())
    with torch.no_grad():
        torch.testing.assert_close(image_loss(pipe, codes), wanted, rtol=0, atol=1e-4)


def test_it_trains(parts):
    check_training(converted(parts))


@torch.no_grad()
def test_images_are_those_of_an_independent_movq(parts):
    """Codes by plain distances, and a decoder whose norms are scaled and shifted by the codes' vectors."""
    state, tokenizer = parts.state, AutoImageTokenizer.from_pretrained(parts.folder / "movqgan.ckpt")
    images = torch.rand(2, 3, 24, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    latents, table = parts.images._latents(images), state["quantize.embedding.weight"]
    distances = torch.cdist(latents.permute(0, 2, 3, 1).flatten(0, 2), table)
    codes = distances.argmin(1).view(2, 3, 4)
    assert torch.equal(tokenizer.encode(images), codes) and len(codes.unique()) > 4
    vectors = table[codes].permute(0, 3, 1, 2)

    def conv(name, x, padding=0):
        return F.conv2d(x, state[f"{name}.weight"], state[f"{name}.bias"], padding=padding)

    def norm(name, x):
        seen = vectors.repeat_interleave(x.shape[-2] // 3, -2).repeat_interleave(x.shape[-1] // 4, -1)
        plain = F.group_norm(x, 32, state[f"{name}.norm_layer.weight"], state[f"{name}.norm_layer.bias"], 1e-6)
        return plain * conv(f"{name}.conv_y", seen) + conv(f"{name}.conv_b", seen)

    def block(name, x):
        inner = conv(f"{name}.conv1", F.silu(norm(f"{name}.norm1", x)), 1)
        inner = conv(f"{name}.conv2", F.silu(norm(f"{name}.norm2", inner)), 1)
        return inner + (conv(f"{name}.nin_shortcut", x) if f"{name}.nin_shortcut.weight" in state else x)

    def attention(name, x):
        q, k, v = (conv(f"{name}.{each}", norm(f"{name}.norm", x)).flatten(2) for each in "qkv")
        weights = (q.transpose(1, 2) @ k * q.shape[1] ** -0.5).softmax(-1)
        return x + conv(f"{name}.proj_out", (v @ weights.transpose(1, 2)).view_as(x))

    x = conv("decoder.conv_in", conv("post_quant_conv", vectors), 1)
    x = block("decoder.mid.block_2", attention("decoder.mid.attn_1", block("decoder.mid.block_1", x)))
    for level in (3, 2, 1, 0):
        for index in (0, 1):
            x = block(f"decoder.up.{level}.block.{index}", x)
            x = attention(f"decoder.up.{level}.attn.{index}", x) if level == 3 else x
        if level:
            x = x.repeat_interleave(2, -2).repeat_interleave(2, -1)
            x = conv(f"decoder.up.{level}.upsample.conv", x, 1)
    x = conv("decoder.conv_out", F.silu(norm("decoder.norm_out", x)), 1)
    torch.testing.assert_close(tokenizer.decode(codes), x.clamp(-1, 1), rtol=0, atol=1e-4)
    assert len(x.unique()) > 100


def test_bad_use_is_named(parts, tmp_path):
    folder = parts.folder
    arguments = ["--checkpoint", str(folder / "language"), "--image-tokenizer", str(folder / "movqgan.ckpt")]
    with pytest.raises(
        ValueError, match=r"the tokenizer of .* lacks '<reserved088\d\d>', as a Lumina-mGPT 2\.0 has it"
    ):
        convert_checkpoint.main(["lumina", *arguments, "--out", str(tmp_path)])
    with pytest.raises(ValueError, match="image_tokenizer: 40 codes from id 400 on need more than the"):
        lumina_pipeline(folder / "language", folder / "movqgan.ckpt", pixels=32, first_code=400)
    with pytest.raises(ValueError, match="pixels: 40 is no multiple of 32"):
        lumina_pipeline(folder / "language", folder / "movqgan.ckpt", pixels=40, first_code=parts.first)


def test_sizes_of_images(parts):
    """Those in front of an image are its grids of 32 pixels, in the prompt its pixels; the square comes first."""
    pipe = lumina_pipeline(parts.folder / "language", parts.folder / "movqgan.ckpt", pixels=64, first_code=parts.first)
    config, added = pipe.model.config, parts.tokenizer.get_added_vocab()
    assert config.image_grids[0] == [8, 8] and [4, 16] in config.image_grids and [16, 4] in config.image_grids
    assert config.image_frame["before"]["4x16"] == [added[grids_token(1)], added[grids_token(4)]]
    assert pipe.default_size == (64, 64) and isinstance(pipe, UnifiedPipeline)

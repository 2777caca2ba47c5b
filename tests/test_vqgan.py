"""Published image tokenizers: codes and images equal those of independent code on the same weights."""

import argparse
import json
import re

import huggingface_hub
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from transformers import (
    ChameleonVQVAE,
    ChameleonVQVAEConfig,
    Emu3Config,
    Emu3ForConditionalGeneration,
    Emu3VQVAE,
    Emu3VQVAEConfig,
    JanusVQVAE,
    JanusVQVAEConfig,
)

from unified_tokenizers import (
    VQGAN,
    AutoImageTokenizer,
    Emu3Tokenizer,
    ImageTokenizer,
    read_weights,
    vqgan_from_weights,
)

WIDTHS, BLOCKS, LATENT, CODES, DIM = (32, 64, 64), 2, 16, 24, 8


# An independent reference: tensors by their published names, walked with plain functions.
def make_layout(kind, seed=0):
    """Random weights in the layout of ``llamagen`` or ``taming``; all sizes are the constants above."""
    generator, state = torch.Generator().manual_seed(seed), {}

    def put(name, *shape):
        scale = 1 / max(1, torch.tensor(shape[1:]).prod().item()) ** 0.5
        state[f"{name}.weight"] = torch.randn(shape, generator=generator) * scale
        state[f"{name}.bias"] = torch.randn(shape[0], generator=generator) * 0.1

    def norm(name, width):
        state[f"{name}.weight"] = 1 + 0.2 * torch.randn(width, generator=generator)
        state[f"{name}.bias"] = 0.2 * torch.randn(width, generator=generator)

    def block(name, before, after):
        norm(f"{name}.norm1", before)
        put(f"{name}.conv1", after, before, 3, 3)
        norm(f"{name}.norm2", after)
        put(f"{name}.conv2", after, after, 3, 3)
        if before != after:
            put(f"{name}.nin_shortcut", after, before, 1, 1)

    def attention(name, width):
        norm(f"{name}.norm", width)
        for part in ("q", "k", "v", "proj_out"):
            put(f"{name}.{part}", width, width, 1, 1)

    middle = ("0", "1", "2") if kind == "llamagen" else ("block_1", "attn_1", "block_2")
    top = len(WIDTHS) - 1
    for side, count in (("encoder", BLOCKS), ("decoder", BLOCKS + 1)):
        down = side == "encoder"
        before = WIDTHS[0] if down else WIDTHS[-1]
        put(f"{side}.conv_in", before, 3 if down else LATENT, 3, 3)
        for order, level in enumerate(range(top + 1) if down else range(top, -1, -1)):
            place = f"conv_blocks.{order}" if kind == "llamagen" else f"{'down' if down else 'up'}.{level}"
            for j in range(count):
                block(f"{side}.{place}.{'res' if kind == 'llamagen' else 'block'}.{j}", before, WIDTHS[level])
                before = WIDTHS[level]
                if level == top and kind == "llamagen":
                    attention(f"{side}.{place}.attn.{j}", before)
            if level != (top if down else 0):
                put(f"{side}.{place}.{'down' if down else 'up'}sample.conv", before, before, 3, 3)
        width = WIDTHS[-1]
        block(f"{side}.mid.{middle[0]}", width, width)
        attention(f"{side}.mid.{middle[1]}", width)
        block(f"{side}.mid.{middle[2]}", width, width)
        norm(f"{side}.norm_out", before)
        put(f"{side}.conv_out", LATENT if down else 3, before, 3, 3)
    put("quant_conv", DIM, LATENT, 1, 1)
    put("post_quant_conv", LATENT, DIM, 1, 1)
    state["quantize.embedding.weight"] = torch.randn(CODES, DIM, generator=generator)
    return state


def conv(state, name, x, **options):
    return F.conv2d(x, state[f"{name}.weight"], state[f"{name}.bias"], **options)


def norm(state, name, x):
    return F.group_norm(x, 32, state[f"{name}.weight"], state[f"{name}.bias"], eps=1e-6)


def swish(x):
    return x * torch.sigmoid(x)


def residual(state, name, x):
    inner = conv(state, f"{name}.conv1", swish(norm(state, f"{name}.norm1", x)), padding=1)
    inner = conv(state, f"{name}.conv2", swish(norm(state, f"{name}.norm2", inner)), padding=1)
    return inner + (conv(state, f"{name}.nin_shortcut", x) if f"{name}.nin_shortcut.weight" in state else x)


def attend(state, name, x):
    normed = norm(state, f"{name}.norm", x)
    q, k, v = (conv(state, f"{name}.{part}", normed).flatten(2) for part in "qkv")
    weights = (torch.einsum("bci,bcj->bij", q, k) / x.shape[1] ** 0.5).softmax(-1)
    return x + conv(state, f"{name}.proj_out", torch.einsum("bij,bcj->bci", weights, v).reshape(x.shape))


def walk(state, side, kind, x):
    """Run an encoder or decoder, reading from the names which parts there are."""
    down = side == "encoder"
    names = ("0", "1", "2") if kind == "llamagen" else ("block_1", "attn_1", "block_2")

    def middle(x):
        for run, name in zip((residual, attend, residual), names, strict=True):
            x = run(state, f"{side}.mid.{name}", x)
        return x

    x = conv(state, f"{side}.conv_in", x, padding=1)
    x = x if down else middle(x)
    order = range(len(WIDTHS)) if down or kind == "llamagen" else reversed(range(len(WIDTHS)))
    for level in order:
        place = f"{side}.conv_blocks.{level}" if kind == "llamagen" else f"{side}.{'down' if down else 'up'}.{level}"
        for j in range(BLOCKS if down else BLOCKS + 1):
            x = residual(state, f"{place}.{'res' if kind == 'llamagen' else 'block'}.{j}", x)
            if f"{place}.attn.{j}.q.weight" in state:
                x = attend(state, f"{place}.attn.{j}", x)
        if f"{place}.downsample.conv.weight" in state:
            x = conv(state, f"{place}.downsample.conv", F.pad(x, (0, 1, 0, 1)), stride=2)
        if f"{place}.upsample.conv.weight" in state:
            x = conv(state, f"{place}.upsample.conv", x.repeat_interleave(2, 2).repeat_interleave(2, 3), padding=1)
    x = middle(x) if down else x
    return conv(state, f"{side}.conv_out", swish(norm(state, f"{side}.norm_out", x)), padding=1)


def reference_encode(state, kind, images):
    latents = conv(state, "quant_conv", walk(state, "encoder", kind, images)).permute(0, 2, 3, 1)
    book = state["quantize.embedding.weight"]
    if kind == "llamagen":
        latents, book = (x / x.norm(dim=-1, keepdim=True) for x in (latents, book))
    return torch.cdist(latents.flatten(1, 2), book[None]).argmin(-1).reshape(latents.shape[:3])


def reference_decode(state, kind, codes):
    book = state["quantize.embedding.weight"]
    book = book / book.norm(dim=-1, keepdim=True) if kind == "llamagen" else book
    return walk(state, "decoder", kind, conv(state, "post_quant_conv", book[codes].permute(0, 3, 1, 2))).clamp(-1, 1)


def random_images(seed=0, height=16, width=24):
    return torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.fixture(scope="module", params=["llamagen", "taming"])
def published(request):
    return request.param, make_layout(request.param)


@pytest.mark.parametrize("wrapper", ["model", "state_dict", None])
def test_codes_and_images_equal_the_reference(published, wrapper, tmp_path):
    kind, state = published
    extra = {"quantize.codebook_used": torch.zeros(7)} if kind == "llamagen" else {"loss.logvar": torch.zeros(())}
    payload = {**state, **extra}
    torch.save({wrapper: payload, "steps": 3} if wrapper else payload, tmp_path / "vq.pt")
    tokenizer = AutoImageTokenizer.from_pretrained(tmp_path / "vq.pt")
    assert isinstance(tokenizer, VQGAN) and isinstance(tokenizer, ImageTokenizer)
    assert (tokenizer.downsample, tokenizer.codebook_size) == (4, CODES)
    codes = tokenizer.encode(random_images())
    assert codes.shape == (2, 4, 6) and len(codes.unique()) > 5
    assert torch.equal(codes, reference_encode(state, kind, random_images()))
    torch.testing.assert_close(tokenizer.decode(codes), reference_decode(state, kind, codes), rtol=0, atol=1e-5)
    vectors = state["quantize.embedding.weight"]
    vectors = F.normalize(vectors, dim=-1) if kind == "llamagen" else vectors
    torch.testing.assert_close(tokenizer.codebook_vectors(), vectors)


def test_folder_round_trip(published, tmp_path):
    kind, state = published
    tokenizer = vqgan_from_weights(state, kind)
    tokenizer.save_pretrained(tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    loaded = AutoImageTokenizer.from_pretrained(tmp_path)
    assert loaded.fingerprint == tokenizer.fingerprint
    codes = loaded.encode(random_images())
    assert torch.equal(codes, tokenizer.encode(random_images()))
    assert torch.equal(loaded.decode(codes), tokenizer.decode(codes))
    loaded.config.normalize_codes = not loaded.config.normalize_codes
    assert loaded.fingerprint != tokenizer.fingerprint


def product_codes(state, images):
    """Codes of IBQ (arXiv 2412.02692): those of the greatest product."""
    latents = conv(state, "quant_conv", walk(state, "encoder", "taming", images))
    return torch.einsum("bchw,kc->bkhw", latents, state["quantize.embedding.weight"]).argmax(1)


@pytest.mark.process
@pytest.mark.parametrize("where", ["checkpoint with averages", "folder of Emu3.5"])
def test_codes_of_ibq_are_those_of_the_greatest_product(where, tmp_path):
    state = make_layout("taming")
    if where == "folder of Emu3.5":
        torch.save(state, tmp_path / "model.ckpt")
        (tmp_path / "config.yaml").write_text("embed_dim: 8\nn_embed: 24\n")
        tokenizer = AutoImageTokenizer.from_pretrained(tmp_path)
    else:
        raw = {name: torch.zeros_like(value) for name, value in state.items()}
        averages = {f"model_ema.{name.replace('.', '')}": value for name, value in state.items()}
        torch.save({"state_dict": raw | averages | {"model_ema.decay": torch.ones(())}}, tmp_path / "ibq.ckpt")
        with pytest.raises(ValueError, match="may be IBQ's, whose codes are those of the greatest product"):
            AutoImageTokenizer.from_pretrained(tmp_path / "ibq.ckpt")
        tokenizer = AutoImageTokenizer.from_pretrained(tmp_path / "ibq.ckpt", quantizer="ibq")
    codes, expected = tokenizer.encode(random_images()), product_codes(state, random_images())
    assert torch.equal(codes, expected) and not torch.equal(codes, reference_encode(state, "taming", random_images()))
    torch.testing.assert_close(tokenizer.decode(codes), reference_decode(state, "taming", codes), rtol=0, atol=1e-5)
    tokenizer.save_pretrained(tmp_path / "saved")
    loaded = AutoImageTokenizer.from_pretrained(tmp_path / "saved")
    assert torch.equal(loaded.encode(random_images()), codes) and loaded.fingerprint == tokenizer.fingerprint
    assert loaded.fingerprint != vqgan_from_weights(state, "taming").fingerprint
    with pytest.raises(ValueError, match=r"quantizer: 'vq' given for .* whose config.json says it"):
        AutoImageTokenizer.from_pretrained(tmp_path / "saved", quantizer="vq")


def test_training_of_ibq_reaches_every_code():
    tokenizer = vqgan_from_weights(make_layout("taming"), "taming", quantizer="ibq").train()
    decoded, codes, loss = tokenizer(random_images())
    assert torch.equal(codes, tokenizer.encode(random_images())) and len(codes.unique()) < CODES
    torch.testing.assert_close(decoded.clamp(-1, 1), tokenizer.decode(codes), rtol=0, atol=1e-4)
    loss.backward()
    assert (tokenizer.quantize.embedding.weight.grad.abs().sum(-1) > 0).all()


@pytest.mark.parametrize("where", ["state file", "folder of DeepSeek", "folder of a tokenizer"])
def test_janus_prefix_and_folders(where, tmp_path):
    state = make_layout("llamagen")
    inside = {f"gen_vision_model.{name}": value for name, value in state.items()}
    others = {"language_model.model.norm.weight": torch.ones(4)}
    if where == "state file":
        torch.save(inside | others, path := tmp_path / "pytorch_model.bin")
    else:
        path = tmp_path
        kind = "multi_modality" if where == "folder of DeepSeek" else "janus_vqgan"
        (path / "config.json").write_text(json.dumps({"model_type": kind}))
        save_file(inside | others if kind == "multi_modality" else state, path / "model.safetensors")
    tokenizer = AutoImageTokenizer.from_pretrained(path)
    assert torch.equal(tokenizer.encode(random_images()), reference_encode(state, "llamagen", random_images()))


def randomized(model, seed=0):
    """Replace transformers' initial weights, many of them zero or one, by random ones."""
    torch.manual_seed(seed)
    for name, value in model.named_parameters():
        value.data = torch.randn_like(value) * (0.1 if value.ndim < 2 else 1 / value[0].numel() ** 0.5)
        if "norm" in name and name.endswith("weight"):
            value.data += 1
    return model.eval()


def test_parity_with_janus_of_transformers(tmp_path):
    config = JanusVQVAEConfig(embed_dim=8, num_embeddings=20, latent_channels=16, base_channels=32,
                              channel_multiplier=[1, 2, 2], num_patches=4)  # fmt: skip
    theirs = randomized(JanusVQVAE(config))
    theirs.save_pretrained(tmp_path)
    ours = AutoImageTokenizer.from_pretrained(tmp_path)
    images = random_images(height=16, width=16)
    with torch.no_grad():
        latents = theirs.quant_conv(theirs.encode(images).last_hidden_state)
    book = theirs.quantize.embedding.weight
    # The original compares on the unit sphere; transformers' encode forgets to.
    expected = torch.einsum("bchw,kc->bkhw", F.normalize(latents, dim=1), F.normalize(book, dim=1)).argmax(1)
    codes = ours.encode(images)
    assert torch.equal(codes, expected)
    with torch.no_grad():
        expected = theirs.decode(codes.flatten(1)).clamp(-1, 1)
    torch.testing.assert_close(ours.decode(codes), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("attention", [None, [4]])
def test_parity_with_the_chameleon_encoder_of_transformers(attention):
    """transformers has no decoder, so taming's decoder of another seed completes the file."""
    config = ChameleonVQVAEConfig(embed_dim=DIM, num_embeddings=CODES, latent_channels=LATENT, base_channels=32,
                                  channel_multiplier=[1, 2, 2], resolution=16, attn_resolutions=attention)  # fmt: skip
    theirs = randomized(ChameleonVQVAE(config))
    state = {name: value.detach() for name, value in theirs.state_dict().items()}
    with pytest.raises(ValueError, match="holds an encoder without its decoder"):
        vqgan_from_weights(state, "chameleon")
    decoder = {name: value for name, value in make_layout("taming", seed=1).items() if name.startswith("decoder")}
    if attention:
        source = {
            name.removeprefix("encoder.down.2.attn.0."): value
            for name, value in state.items()
            if "down.2.attn.0." in name
        }
        decoder |= {f"decoder.up.2.attn.{j}.{part}": value for j in range(3) for part, value in source.items()}
    ours = vqgan_from_weights(state | decoder, "vqgan.ckpt")
    with torch.no_grad():
        expected = theirs.encode(random_images()).image_tokens.reshape(2, 4, 6)
    assert torch.equal(ours.encode(random_images()), expected)
    torch.testing.assert_close(
        ours.decode(expected), reference_decode(state | decoder, "taming", expected), rtol=0, atol=1e-5
    )


def test_a_chameleon_folder_with_its_decoder(tmp_path):
    """Some repositories hold one in transformers' names, where the decoder's first level runs first."""
    state = make_layout("taming")
    renamed = {
        re.sub(r"decoder\.up\.(\d)", lambda m: f"decoder.up.{2 - int(m[1])}", name): value
        for name, value in state.items()
    }
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "chameleon_vqgan"}))
    save_file(renamed, tmp_path / "model.safetensors")
    tokenizer = AutoImageTokenizer.from_pretrained(tmp_path)
    codes = tokenizer.encode(random_images())
    assert torch.equal(codes, reference_encode(state, "taming", random_images()))
    torch.testing.assert_close(tokenizer.decode(codes), reference_decode(state, "taming", codes), rtol=0, atol=1e-5)


EMU3 = {"codebook_size": 20, "embed_dim": 4, "latent_channels": 4, "base_channels": 32, "channel_multiplier": [1, 2],
        "num_res_blocks": 1, "attn_resolutions": [1], "hidden_size": 64, "temporal_downsample_factor": 2}  # fmt: skip


@pytest.mark.process
@pytest.mark.parametrize("whole", [False, True])
def test_parity_with_emu3_of_transformers(whole, tmp_path):
    if whole:
        text = {"vocab_size": 30, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
                "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
        model = Emu3ForConditionalGeneration(
            Emu3Config(vq_config=EMU3, text_config=text, vocabulary_map={"<image>": 3})
        )
        theirs = randomized(model.model.vqmodel)
        model.save_pretrained(tmp_path)
    else:
        theirs = randomized(Emu3VQVAE(Emu3VQVAEConfig(**EMU3)))
        theirs.save_pretrained(tmp_path)
    ours = AutoImageTokenizer.from_pretrained(tmp_path)
    assert isinstance(ours, Emu3Tokenizer) and isinstance(ours, ImageTokenizer)
    with torch.no_grad():
        expected = torch.stack(theirs.encode(random_images(), torch.tensor([[16, 24]] * 2)).image_tokens)
        codes = ours.encode(random_images())
        assert torch.equal(codes, expected) and codes.shape == (2, 8, 12)
        torch.testing.assert_close(ours.decode(codes), theirs.decode(expected).clamp(-1, 1), rtol=0, atol=1e-5)
    assert torch.equal(ours.codebook_vectors(), theirs.quantize.embedding.weight)
    ours.save_pretrained(tmp_path / "alone")
    assert AutoImageTokenizer.from_pretrained(tmp_path / "alone").fingerprint == ours.fingerprint
    with pytest.raises(ValueError, match="size 15x16 does not divide by the tokenizer's stride 2"):
        ours.encode(torch.zeros(1, 3, 15, 16))


@pytest.mark.process
def test_training_pulls_codes_and_images():
    tokenizer = vqgan_from_weights(make_layout("llamagen"), "llamagen").train()
    optimizer = torch.optim.AdamW(tokenizer.parameters(), 2e-3)
    errors = []
    for _ in range(8):
        decoded, codes, pull = tokenizer(random_images())
        error = (decoded - random_images()).square().mean()
        (error + pull).backward()
        assert tokenizer.encoder.conv_in.weight.grad.abs().sum() > 0
        optimizer.step()
        optimizer.zero_grad()
        errors.append(error.item())
    assert codes.shape == (2, 4, 6) and errors[-1] < 0.7 * errors[0]


class TestBadFiles:
    @pytest.fixture
    def state(self):
        return make_layout("llamagen")

    def load(self, payload, folder):
        torch.save(payload, folder / "vq.pt")
        return AutoImageTokenizer.from_pretrained(folder / "vq.pt")

    def test_another_layout(self, tmp_path):
        with pytest.raises(
            ValueError, match=r"no image tokenizer that is known here .* its tensors are layers.0.weight"
        ):
            self.load({"layers.0.weight": torch.zeros(2)}, tmp_path)

    def test_missing_tensor(self, state, tmp_path):
        del state["decoder.mid.1.k.bias"]
        with pytest.raises(ValueError, match=r"vq.pt' does not fit VQGAN \(missing: decoder.mid.1.k.bias\)"):
            self.load({"model": state}, tmp_path)

    def test_missing_codebook(self, state, tmp_path):
        del state["quantize.embedding.weight"]
        with pytest.raises(ValueError, match=r"has no 'quantize.embedding.weight'"):
            self.load(state, tmp_path)

    def test_unknown_tensor(self, state, tmp_path):
        with pytest.raises(ValueError, match=r"\(not expected: encoder.extra\)"):
            self.load(state | {"encoder.extra": torch.zeros(1)}, tmp_path)

    def test_wrong_shape(self, state, tmp_path):
        state["decoder.conv_out.bias"] = torch.zeros(4)
        with pytest.raises(ValueError, match=r"of another shape: decoder.conv_out.bias \(4,\) instead of \(3,\)"):
            self.load(state, tmp_path)

    def test_a_pickle_that_is_not_plain_tensors(self, state, tmp_path):
        with pytest.raises(ValueError, match=r"not a file of plain tensors \(it holds argparse.Namespace\)"):
            self.load({"model": state, "args": argparse.Namespace(lr=1)}, tmp_path)
        with pytest.raises(ValueError, match=r"holds more than tensors \(name\)"):
            self.load({**state, "name": "vq"}, tmp_path)
        with pytest.raises(ValueError, match="holds a list; need tensors by name"):
            self.load([torch.zeros(1)], tmp_path)

    def test_code_in_a_pickle_does_not_run(self, tmp_path):
        class Trap:
            def __reduce__(self):
                return (open, (str(tmp_path / "ran"), "w"))

        with pytest.raises(ValueError, match="not a file of plain tensors"):
            self.load({"model": Trap()}, tmp_path)
        assert not (tmp_path / "ran").exists()

    @pytest.mark.parametrize("name", ["broken.ckpt", "broken.safetensors"])
    def test_no_weights_file_at_all(self, name, tmp_path):
        (tmp_path / name).write_bytes(b"nothing of the kind")
        with pytest.raises(ValueError, match=r"broken.* is not a"):
            AutoImageTokenizer.from_pretrained(tmp_path / name)

    @pytest.mark.parametrize("name", ["vq_ds16_missing.pt", "./nowhere"])
    def test_nothing_there(self, name):
        with pytest.raises(ValueError, match=f"image_tokenizer: '{name}' does not exist on this machine"):
            AutoImageTokenizer.from_pretrained(name)

    def test_two_files_in_a_folder(self, tmp_path):
        for name in ("a.pt", "b.pt"):
            torch.save({}, tmp_path / name)
        with pytest.raises(ValueError, match=r"holds 2 weights files \['a.pt', 'b.pt'\]; name the one to read"):
            AutoImageTokenizer.from_pretrained(tmp_path)

    def test_missing_shard(self, tmp_path):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "multi_modality"}))
        index = {"weight_map": {"a": "model-1.safetensors"}}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
        with pytest.raises(ValueError, match=r"lacks the shards model-1.safetensors"):
            AutoImageTokenizer.from_pretrained(tmp_path)

    def test_model_without_a_tokenizer(self, tmp_path):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "janus"}))
        save_file({"lm_head.weight": torch.zeros(1)}, tmp_path / "model.safetensors")
        with pytest.raises(ValueError, match=r"has a name that starts with gen_vision_model. or model.vqmodel."):
            AutoImageTokenizer.from_pretrained(tmp_path)

    def test_image_that_does_not_divide(self, state):
        with pytest.raises(ValueError, match="size 18x16 does not divide by the tokenizer's stride 4"):
            vqgan_from_weights(state, "x").encode(torch.zeros(1, 3, 18, 16))
        with pytest.raises(ValueError, match=r"codes: values 24..24 leave the codebook \[0, 24\)"):
            vqgan_from_weights(state, "x").decode(torch.full((1, 2, 2), 24))


def test_weights_file_on_the_hub(monkeypatch, tmp_path):
    """The name is taken apart for huggingface_hub, which downloads; a name without a file is refused."""
    torch.save({"a": torch.ones(2)}, tmp_path / "w.pt")
    asked = []
    monkeypatch.setattr(
        huggingface_hub, "hf_hub_download", lambda *names: asked.append(names) or str(tmp_path / "w.pt")
    )
    assert read_weights("hf-hub:owner/name/sub/w.pt")["a"].tolist() == [1, 1]
    assert asked == [("owner/name", "sub/w.pt")]
    with pytest.raises(ValueError, match="'hf-hub:owner/name' is not of the form hf-hub:owner/name/file"):
        read_weights("hf-hub:owner/name")

"""Published language models that make images: codes and logits equal those of transformers' classes, and they train."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import inputs_of
from published import TEXT, byte_tokenizer, check_training, greedy_codes, image_loss, randomize, reloaded
from safetensors.torch import save_file
from transformers import (
    ChameleonConfig,
    ChameleonForConditionalGeneration,
    Emu3Config,
    Emu3ForConditionalGeneration,
    GemmaConfig,
    GemmaForCausalLM,
    JanusConfig,
    JanusForConditionalGeneration,
    JanusVisionConfig,
    JanusVQVAEConfig,
    LlamaConfig,
)

from unified.convert import chameleon, emu3, janus, liquid
from unified.data.captioned import captioned_sequence
from unified.pipeline.arguments import image_prompt
from unified.pipeline.options import GenerationOptions
from unified.serving.engine import Engine
from unified_tokenizers import VQGAN, VQGANConfig

pytestmark = pytest.mark.process


@pytest.fixture(scope="module")
def janus_parts(tmp_path_factory):
    """A Janus of transformers with random weights, its tokenizer, and their folder."""
    folder = tmp_path_factory.mktemp("janus")
    tokenizer = byte_tokenizer(janus.BOI, janus.EOI, "<|User|>", "<|Assistant|>", pad=janus.PAD)
    ids = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    torch.manual_seed(0)
    model = JanusForConditionalGeneration(
        JanusConfig(
            text_config=LlamaConfig(vocab_size=320, **TEXT, **ids, tie_word_embeddings=False),
            vision_config=JanusVisionConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=4,
                                            projection_dim=64, num_image_tokens=16),
            vq_config=JanusVQVAEConfig(embed_dim=8, num_embeddings=40, latent_channels=32, base_channels=32,
                                       channel_multiplier=[1, 1, 2], num_res_blocks=1, projection_dim=64,
                                       image_token_embed_dim=64),
            image_token_id=5, tie_word_embeddings=False,
        )
    )  # fmt: skip
    randomize(model).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return SimpleNamespace(folder=folder, model=model, tokenizer=tokenizer)


class TestJanus:
    @torch.no_grad()
    def test_images_are_those_of_transformers(self, janus_parts, tmp_path):
        """Greedy codes with guidance, and their pixels; from a pipeline that was saved and loaded."""
        model, tokenizer = janus_parts.model, janus_parts.tokenizer
        pipe = reloaded(janus.janus_pipeline(janus_parts.folder), tmp_path)
        assert pipe.sampling["guidance_scale"] == 5.0
        generation = model.generation_config
        generation.generation_kwargs = {"boi_token_id": tokenizer.convert_tokens_to_ids(janus.BOI)}
        for prompt in ("red apple", "the small dog and <|User|>"):
            text = f"<|User|>: {prompt}\n\n<|Assistant|>:{janus.BOI}"
            ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer.encode(text, add_special_tokens=False)]])
            row = image_prompt(prompt, pipe.text_tokenizer, pipe.model.config, (4, 4))
            assert (row.ids == tuple(ids[0].tolist())) == ("<" not in prompt)  # a caption cannot spell a special token
            ids = torch.tensor([row.ids])
            wanted = model.generate(
                ids, attention_mask=torch.ones_like(ids), generation_mode="image", do_sample=False, guidance_scale=5.0,
            )  # fmt: skip
            found = pipe(prompt, top_k=1, output_type="codes").codes
            assert torch.equal(found.flatten(), wanted[0]) and len(found.unique()) > 4
            pixels = model.decode_image_tokens(wanted).permute(0, 3, 1, 2)
            torch.testing.assert_close(pipe.image_tokenizer.decode(found), pixels.clamp(-1, 1), rtol=0, atol=1e-4)

    def test_both_layouts_are_one_model(self, janus_parts, tmp_path):
        """DeepSeek's names and transformers' give the same weights."""
        wanted = janus.janus_pipeline(janus_parts.folder)
        state = {}
        names = {**janus._LANGUAGE, **janus._IMAGE}
        theirs = {names[old]: old for old in list(names)[:2] + list(janus._IMAGE)[:5]}
        for name, value in janus_parts.model.state_dict().items():
            old = next((old for old in list(names)[2:] if old not in theirs.values() and name.startswith(old)), None)
            if old is not None:
                state[theirs[names[old]] + name.removeprefix(old)] = value.contiguous()
        tokenizer = {f"gen_vision_model.{n}": v for n, v in wanted.image_tokenizer.state_dict().items()}
        save_file(state | tokenizer, tmp_path / "model.safetensors")
        config = janus_parts.model.config.text_config.to_dict()
        described = {
            "model_type": "multi_modality",
            "language_config": {**config, "_attn_implementation": "flash_attention_2"},
        }
        (tmp_path / "config.json").write_text(json.dumps(described))
        janus_parts.tokenizer.save_pretrained(tmp_path)
        found = janus.janus_pipeline(tmp_path)
        assert found.model.config.image_grids == [[24, 24]] and wanted.model.config.image_grids == [[4, 4]]
        assert found.image_tokenizer.fingerprint == wanted.image_tokenizer.fingerprint
        ours = wanted.model.state_dict()
        assert all(torch.equal(value, ours[name]) for name, value in found.model.state_dict().items())

    def test_it_trains(self, janus_parts):
        check_training(janus.janus_pipeline(janus_parts.folder))

    @torch.no_grad()
    def test_logits_and_loss(self, janus_parts):
        pipe = janus.janus_pipeline(janus_parts.folder)
        model, config = janus_parts.model, pipe.model.config
        codes = torch.arange(16).reshape(4, 4)
        row = image_prompt("red apple", pipe.text_tokenizer, config, (4, 4)).ids
        embeds = model.get_input_embeddings()(torch.tensor([row]))
        image = model.prepare_embeddings_for_image_generation(codes.reshape(1, -1))
        hidden = model.model.language_model(inputs_embeds=torch.cat([embeds, image], dim=1)).last_hidden_state
        wanted = model.model.generation_head(hidden[0, len(row) - 1 : -1])
        loss = torch.nn.functional.cross_entropy(wanted, codes.flatten())
        torch.testing.assert_close(image_loss(pipe, codes), loss, rtol=0, atol=1e-4)

    def test_other_models_are_refused(self, janus_parts, tmp_path):
        LlamaConfig(vocab_size=10, **TEXT).save_pretrained(tmp_path)
        save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
        with pytest.raises(ValueError, match="is a 'llama' model, not a Janus-Pro one"):
            janus.janus_pipeline(tmp_path)


@pytest.fixture(scope="module")
def chameleon_tokenizer(tmp_path_factory):
    """A folder with a tiny image tokenizer as Chameleon's: codes are compared plainly."""
    folder = tmp_path_factory.mktemp("vqgan")
    torch.manual_seed(1)
    VQGAN(
        VQGANConfig(channels=32, multipliers=[1, 1], residual_blocks=1, attention_levels=[], latent_channels=8,
                    codebook_size=40, code_dim=8, normalize_codes=False)
    ).save_pretrained(folder)  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def liquid_parts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("liquid")
    tokenizer = byte_tokenizer(liquid.BOI, liquid.EOI, liquid.NULL)
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": 0}
    model = GemmaForCausalLM(
        GemmaConfig(vocab_size=len(tokenizer) + 40, head_dim=16, tie_word_embeddings=False, **TEXT, **ids)
    )
    randomize(model, 0.1).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return SimpleNamespace(folder=folder, model=model, tokenizer=tokenizer)


class TestLiquid:
    def test_images_are_those_of_transformers(self, liquid_parts, chameleon_tokenizer, tmp_path):
        pipe = liquid.liquid_pipeline(liquid_parts.folder, chameleon_tokenizer)
        assert pipe.model.config.image_grids == [[256, 256]]
        pipe.model.config.image_grids = [[3, 4]]
        pipe = reloaded(pipe, tmp_path)
        text = "red apple Generate an image based on this description.<boi>"
        rows = [[liquid_parts.tokenizer.bos_token_id, *liquid_parts.tokenizer.encode(each, add_special_tokens=False)]
                for each in (text, "<unconditional><boi>")]  # fmt: skip
        first = len(liquid_parts.tokenizer)
        wanted = greedy_codes(lambda ids: liquid_parts.model(ids).logits, *rows, 12, first, 40, 7.0)
        found = pipe("red apple", top_k=1, top_p=1.0, output_type="codes").codes
        assert torch.equal(found.flatten(), wanted) and len(wanted.unique()) > 4

    def test_it_trains(self, liquid_parts, chameleon_tokenizer):
        pipe = liquid.liquid_pipeline(liquid_parts.folder, chameleon_tokenizer)
        pipe.model.config.image_grids = [[3, 4]]
        check_training(pipe)

    def test_another_image_tokenizer_is_refused(self, liquid_parts, chameleon_tokenizer, tmp_path):
        model = GemmaForCausalLM(GemmaConfig(vocab_size=len(liquid_parts.tokenizer) + 41, head_dim=16, **TEXT))
        model.save_pretrained(tmp_path)
        liquid_parts.tokenizer.save_pretrained(tmp_path)
        with pytest.raises(ValueError, match=r"has \d+ rows before the last 40, its tokenizer \d+ ids"):
            liquid.liquid_pipeline(tmp_path, chameleon_tokenizer)


@pytest.fixture(scope="module")
def emu3_parts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("emu3")
    names = [emu3.CODE.format(code) for code in range(40)]
    tokenizer = byte_tokenizer(emu3.BOI, emu3.EOI, emu3.IMAGE, emu3.ROW_END, emu3.IMAGE_END, "<image>", *names)
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": 0}
    added = tokenizer.get_added_vocab()
    shuffled = dict(zip(names, [added[name] for name in reversed(names)], strict=True))  # codes need not be in order
    vq = {
        "codebook_size": 40, "embed_dim": 4, "latent_channels": 4, "base_channels": 32, "channel_multiplier": [1, 1],
        "num_res_blocks": 1, "attn_resolutions": [], "hidden_size": 32, "temporal_downsample_factor": 2,
    }  # fmt: skip
    model = Emu3ForConditionalGeneration(
        Emu3Config(
            vq_config=vq,
            text_config={"vocab_size": len(tokenizer), **TEXT, **ids},
            vocabulary_map={**added, **shuffled},
        )
    )
    randomize(model, 0.05).save_pretrained(folder)
    return SimpleNamespace(folder=folder, model=model, tokenizer=tokenizer, codes=[shuffled[name] for name in names])


class TestEmu3:
    GRID = (3, 4)

    @pytest.fixture
    def pipe(self, emu3_parts, tmp_path):
        emu3_parts.tokenizer.save_pretrained(emu3_parts.folder)
        pipe = emu3.emu3_pipeline(emu3_parts.folder, [self.GRID])
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def ids(self, parts, text):
        text = f"<s>{text}{emu3.BOI}3*4{emu3.IMAGE}"
        return parts.tokenizer.encode(text, add_special_tokens=False)

    @torch.no_grad()
    def reference(self, parts, text, scale=3.0):
        """Codes by guided full forward passes over the joint table, with a token behind every row."""
        rows, codes = [self.ids(parts, each) for each in (text, emu3.NEGATIVE)], []
        wanted = torch.tensor(parts.codes)
        while len(codes) < 12:
            one, two = (parts.model(torch.tensor([row])).logits[0, -1, wanted] for row in rows)
            codes.append(int((two + scale * (one - two)).argmax()))
            new = [parts.codes[codes[-1]]]
            new += [] if len(codes) % 4 else [parts.tokenizer.convert_tokens_to_ids(emu3.ROW_END)]
            rows = [row + new for row in rows]
        return torch.tensor(codes)

    def test_images_are_those_of_transformers(self, pipe, emu3_parts, tmp_path):
        """Greedy codes with guidance and the published negative prompt: of a saved pipeline, of its engine, and where codes are
        known.
        """
        wanted = self.reference(emu3_parts, "red apple").reshape(1, *self.GRID)
        pipe = reloaded(pipe, tmp_path)
        assert torch.equal(pipe("red apple", top_k=1, output_type="codes").codes, wanted) and len(wanted.unique()) > 4
        known = wanted.where(torch.arange(12).reshape(1, 3, 4) < 7, -1)
        assert torch.equal(pipe("red apple", top_k=1, known=known, output_type="codes").codes, wanted)
        other = pipe("blue car", top_k=1, output_type="codes").codes
        both = pipe(["red apple", "blue car"], top_k=1, output_type="codes").codes
        assert torch.equal(both, torch.cat([wanted, other])) and not torch.equal(other, wanted)
        engine = Engine(pipe, max_rows=4)
        try:
            jobs = [engine.submit(text, GenerationOptions(top_k=1)) for text in ("blue car", "red apple")]
            assert [job.result(60).codes.tolist() for job in jobs] == [other.tolist(), wanted.tolist()]
        finally:
            engine.close()

    @torch.no_grad()
    def test_logits_and_loss(self, pipe, emu3_parts):
        codes = torch.randint(0, 40, self.GRID, generator=torch.Generator().manual_seed(3))
        row_end = emu3_parts.tokenizer.convert_tokens_to_ids(emu3.ROW_END)
        image = [each for row in codes.tolist() for each in [*(emu3_parts.codes[code] for code in row), row_end]]
        start = self.ids(emu3_parts, "red apple")
        logits = emu3_parts.model(torch.tensor([start + image])).logits[0, len(start) - 1 : -1]
        places = [i for i in range(15) if i % 5 < 4]  # the fifth of a row is its end
        scores = logits[places][:, emu3_parts.codes]
        wanted = torch.nn.functional.cross_entropy(scores, codes.flatten())
        torch.testing.assert_close(image_loss(pipe, codes), wanted, rtol=0, atol=1e-4)

    def test_a_frame_in_a_row(self, pipe, emu3_parts):
        """All tokens of the published layout in their order; those of the frame are not in the loss."""
        config, codes = pipe.model.config, torch.arange(12).reshape(3, 4)
        special = emu3_parts.tokenizer.get_added_vocab()
        sequence = captioned_sequence(
            {"caption": "red apple", "codes": list(range(12)), "height": 3, "width": 4}, np.random.default_rng(0),
            pipe.text_tokenizer, config.vocabulary,
        )  # fmt: skip
        batch = inputs_of(config, sequence)
        size, image = config.text_config.vocab_size, []
        for row in codes.tolist():
            image += [*(size + code for code in row), special[emu3.ROW_END]]
        wanted = [*self.ids(emu3_parts, "red apple"), *image, special[emu3.IMAGE_END], special[emu3.EOI]]
        assert batch["input_ids"][0].tolist() == wanted
        assert batch["positions"][0, :, 0].tolist() == list(range(len(wanted)))
        assert batch["image_inputs"].tolist() == [i for i, each in enumerate(wanted) if each >= size]
        assert batch["text_targets"].tolist() == [len(wanted) - 1]

    def test_encoding_and_decoding(self, pipe, emu3_parts):
        images = torch.rand(2, 3, 6, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
        with torch.no_grad():
            tokens = emu3_parts.model.model.get_image_tokens(images, torch.tensor([[6, 8], [6, 8]])).reshape(2, 3, 5)
            codes = pipe.image_tokenizer.encode(images)
            assert (
                torch.tensor(emu3_parts.codes)[codes].tolist() == tokens[..., :4].tolist() and len(codes.unique()) > 4
            )
            pixels = emu3_parts.model.model.vqmodel.decode(codes)
        torch.testing.assert_close(pipe.image_tokenizer.decode(codes), pixels.clamp(-1, 1), rtol=0, atol=1e-5)

    def test_it_trains(self, pipe):
        check_training(pipe)

    def test_bad_use_is_named(self, pipe):
        config = pipe.model.config
        with pytest.raises(
            ValueError, match=r"decoding: 'jacobi' needs the order 'raster' .*, without tokens between codes"
        ):
            pipe("red apple", decoding="jacobi")
        config.image_grids = [[3, 4], [4, 4]]
        with pytest.raises(
            ValueError, match=r"image_frame.before: no tokens for a grid of 4x4 codes; the model has 3x4"
        ):
            pipe("red apple", height=8, width=8)
        with pytest.raises(ValueError, match="patches have no place for the tokens between codes"):
            inputs_of(config, captioned_sequence(
                {"caption": "red apple", "codes": [0] * 16, "height": 4, "width": 4}, np.random.default_rng(0),
                pipe.text_tokenizer, config.vocabulary,
            ), p=2)  # fmt: skip


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "swin"])
def chameleon_parts(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("chameleon")
    tokenizer = byte_tokenizer(chameleon.BOI, chameleon.EOI, chameleon.END_OF_TURN, "<image>")
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": 0}
    first, order = len(tokenizer), torch.randperm(40, generator=torch.Generator().manual_seed(0)).tolist()
    names = {chameleon.code_name(code): first + place for code, place in enumerate(order)}
    vq = {
        "embed_dim": 8, "num_embeddings": 40, "latent_channels": 8, "base_channels": 32, "channel_multiplier": [1, 1],
        "num_res_blocks": 1,
    }  # fmt: skip
    model = ChameleonForConditionalGeneration(
        ChameleonConfig(vocab_size=first + 40, vq_config=vq, vocabulary_map={**tokenizer.get_added_vocab(), **names},
                        swin_norm=request.param, tie_word_embeddings=False, **TEXT, **ids)
    )  # fmt: skip
    with torch.no_grad():
        for layer in randomize(model, 0.05).model.layers:
            for norm in (layer.self_attn.q_norm, layer.self_attn.k_norm):  # of every head its own
                norm.weight.add_(1.0)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return SimpleNamespace(folder=folder, model=model, tokenizer=tokenizer, codes=list(names.values()))


class TestChameleon:
    def test_images_are_those_of_transformers(self, chameleon_parts, chameleon_tokenizer, tmp_path):
        """Before its mask of codes; the order of the codes in the vocabulary is none."""
        pipe = chameleon.chameleon_pipeline(chameleon_parts.folder, chameleon_tokenizer)
        pipe.model.config.image_grids = [[3, 4]]
        pipe = reloaded(pipe, tmp_path)
        inner, head = chameleon_parts.model.model, chameleon_parts.model.lm_head.weight[chameleon_parts.codes]
        rows = [chameleon_parts.tokenizer.encode(text, add_special_tokens=False)
                for text in (f"<s>red apple{chameleon.END_OF_TURN}{chameleon.BOI}", f"<s>{chameleon.BOI}")]  # fmt: skip
        codes = []
        with torch.no_grad():
            while len(codes) < 12:
                after = [chameleon_parts.codes[code] for code in codes]
                one, two = (inner(torch.tensor([row + after])).last_hidden_state[0, -1] @ head.T for row in rows)
                codes.append(int((two + 3.0 * (one - two)).argmax()))
        found = pipe("red apple", top_k=1, top_p=1.0, output_type="codes").codes
        assert found.flatten().tolist() == codes and len(set(codes)) > 4
        check_training(pipe)

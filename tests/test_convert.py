"""Published models, converted: logits equal those of independent code, or of transformers, on the same weights."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import full_forward, inputs_of
from safetensors.torch import load_file, save_file
from transformers import CohereConfig, CohereForCausalLM, GemmaConfig, GemmaForCausalLM, LlamaConfig, LlamaForCausalLM

import convert_checkpoint
from unified import UnifiedForCausalLM
from unified.convert import llamagen_from_weights, split_joint_table
from unified.decoding import Sampling, generate_codes, generate_conditioned
from unified.model.prefix import condition_positions
from unified.sequence import ImageSegment, TextSegment, build_sequence

WIDTH, HEADS, LAYERS, HIDDEN, CODES, CLASSES = 32, 4, 2, 48, 20, 5
CAPTION, FEATURES = 6, 10
ROOT = Path(__file__).resolve().parent.parent


def generators(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


# An independent LlamaGen: its tensors by name, its rotation of neighbouring pairs as complex numbers.
def llamagen_state(kind, key_heads=HEADS, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator) / shape[-1] ** 0.5

    head = WIDTH // HEADS
    state = {
        "tok_embeddings.weight": normal(CODES, WIDTH) * 3,
        "output.weight": normal(CODES, WIDTH),
        "norm.weight": 1 + normal(WIDTH),
    }
    for i in range(LAYERS):
        state |= {
            f"layers.{i}.attention.wqkv.weight": normal(WIDTH + 2 * key_heads * head, WIDTH) * 2,
            f"layers.{i}.attention.wo.weight": normal(WIDTH, WIDTH),
            f"layers.{i}.feed_forward.w1.weight": normal(HIDDEN, WIDTH),
            f"layers.{i}.feed_forward.w2.weight": normal(WIDTH, HIDDEN),
            f"layers.{i}.feed_forward.w3.weight": normal(HIDDEN, WIDTH),
            f"layers.{i}.attention_norm.weight": 1 + normal(WIDTH),
            f"layers.{i}.ffn_norm.weight": 1 + normal(WIDTH),
        }  # fmt: skip
    if kind == "c2i":
        return state | {"cls_embedding.embedding_table.weight": normal(CLASSES + 1, WIDTH) * 3}
    return state | {
        "cls_embedding.cap_proj.fc1.weight": normal(WIDTH, FEATURES) * 3,
        "cls_embedding.cap_proj.fc2.weight": normal(WIDTH, WIDTH) * 3,
        "cls_embedding.uncond_embedding": normal(CAPTION, FEATURES),
    }


def llamagen_logits(state, condition, codes, grid, mask=None):
    """Logits of every code, ``(B, h*w, K)``."""
    if condition.ndim == 1:
        prefix = state["cls_embedding.embedding_table.weight"][condition][:, None]
    else:
        inner = F.gelu(condition @ state["cls_embedding.cap_proj.fc1.weight"].T, approximate="tanh")
        prefix = inner @ state["cls_embedding.cap_proj.fc2.weight"].T
    x = torch.cat([prefix, state["tok_embeddings.weight"][codes]], 1)
    head, length = WIDTH // HEADS, x.shape[1]
    frequency = 10000.0 ** (-torch.arange(0, head // 2, 2) / (head // 2))
    rows, columns = torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")
    angle = torch.cat([rows.flatten()[:, None] * frequency, columns.flatten()[:, None] * frequency], -1)
    turn = torch.cat(
        [torch.zeros(prefix.shape[1], head // 2, dtype=torch.complex64), torch.polar(torch.ones_like(angle), angle)]
    )
    visible = torch.ones(length, length).tril().bool().expand(len(x), -1, -1)
    if mask is not None:
        visible = visible & F.pad(mask, (0, codes.shape[1]), value=1).bool()[:, None] | torch.eye(length).bool()

    def rms(x, name):
        return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * state[name]

    def rotate(x):
        pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2).contiguous())
        return torch.view_as_real(pairs * turn[None, :, None]).flatten(-2)

    for i in range(LAYERS):
        normed = rms(x, f"layers.{i}.attention_norm.weight")
        packed = normed @ state[f"layers.{i}.attention.wqkv.weight"].T
        key_width = (packed.shape[-1] - WIDTH) // 2
        q, k, v = (part.reshape(*x.shape[:2], -1, head) for part in packed.split([WIDTH, key_width, key_width], -1))
        q, k = rotate(q), rotate(k)
        k, v = (part.repeat_interleave(HEADS // part.shape[2], 2) for part in (k, v))
        scores = torch.einsum("bihd,bjhd->bhij", q, k) / head**0.5
        weights = scores.masked_fill(~visible[:, None], -torch.inf).softmax(-1)
        x = x + torch.einsum("bhij,bjhd->bihd", weights, v).flatten(2) @ state[f"layers.{i}.attention.wo.weight"].T
        normed = rms(x, f"layers.{i}.ffn_norm.weight")
        gate = F.silu(normed @ state[f"layers.{i}.feed_forward.w1.weight"].T)
        x = (
            x
            + (gate * (normed @ state[f"layers.{i}.feed_forward.w3.weight"].T))
            @ state[f"layers.{i}.feed_forward.w2.weight"].T
        )
    logits = rms(x, "norm.weight") @ state["output.weight"].T
    return logits[:, prefix.shape[1] - 1 : -1]


def some_codes(count=2, height=3, width=4, size=CODES, seed=0):
    return torch.randint(0, size, (count, height, width), generator=torch.Generator().manual_seed(seed))


def some_condition(kind):
    if kind == "c2i":
        return torch.tensor([3, CLASSES]), None
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    return torch.randn(2, CAPTION, FEATURES, generator=torch.Generator().manual_seed(7)), mask


def conditioned_batch(model, codes, mask, p=1):
    vocabulary = model.config.vocabulary
    positions = condition_positions(model.condition.length, vocabulary)
    sequences = [build_sequence([positions, ImageSegment(image)], vocabulary) for image in codes]
    batch = inputs_of(model.config, *sequences, p=p)
    if mask is not None:
        batch["attention_mask"] = F.pad(mask, (0, batch["input_ids"].shape[1] - mask.shape[1]), value=1)
    return batch


class TestLlamaGen:
    @pytest.mark.parametrize(("kind", "key_heads"), [("c2i", HEADS), ("t2i", HEADS), ("c2i", 2)])
    def test_logits_and_loss(self, kind, key_heads):
        state = llamagen_state(kind, key_heads)
        model = llamagen_from_weights(state, "x.pt", num_attention_heads=HEADS)
        codes, (condition, mask) = some_codes(), some_condition(kind)
        expected = llamagen_logits(state, condition, codes.flatten(1), (3, 4), mask)
        batch = conditioned_batch(model, codes, mask)
        labels = batch.pop("labels")
        with torch.no_grad():
            start = model.condition.length - 1
            actual = model(**batch, condition=condition).image_logits[:, start : start + 12]
            loss = model(**batch, labels=labels, condition=condition)
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)
        torch.testing.assert_close(
            loss.image_loss, F.cross_entropy(expected.flatten(0, 1), codes.flatten()), rtol=0, atol=1e-5
        )
        assert torch.equal(loss.loss, loss.image_loss)

    @pytest.mark.process
    @pytest.mark.parametrize("wrapper", ["model", "module", "state_dict", None])
    def test_recipe_and_folder(self, wrapper, tmp_path, capsys):
        state = llamagen_state("c2i")
        torch.save({wrapper: state} if wrapper else state, tmp_path / "gpt.pt")
        if wrapper is None:  # once through the command line
            command = ["llamagen", "--checkpoint", tmp_path / "gpt.pt", "--out", tmp_path / "out", "--heads", HEADS,
                       "--grid", 3, 4]  # fmt: skip
            convert_checkpoint.main([*map(str, command)])
            assert f"{CODES} codes" in capsys.readouterr().out
        else:
            from unified_tokenizers import read_weights

            llamagen_from_weights(read_weights(tmp_path / "gpt.pt"), "gpt.pt", HEADS).save_pretrained(tmp_path / "out")
        loaded = UnifiedForCausalLM.from_pretrained(tmp_path / "out").eval()
        codes, (condition, _) = some_codes(), some_condition("c2i")
        batch = conditioned_batch(loaded, codes, None)
        with torch.no_grad():
            del batch["labels"]
            actual = loaded(**batch, condition=condition).image_logits[:, :12]
        torch.testing.assert_close(
            actual, llamagen_logits(state, condition, codes.flatten(1), (3, 4)), rtol=0, atol=1e-5
        )
        assert loaded.config.image_grids == ([[3, 4]] if wrapper is None else None)

    @pytest.mark.parametrize("kind", ["c2i", "t2i"])
    def test_greedy_guided_generation_equals_the_reference(self, kind):
        """Every sampled code is the argmax of the guided reference logits over the codes before it."""
        state = llamagen_state(kind)
        model = llamagen_from_weights(state, "x.pt", num_attention_heads=HEADS)
        condition, mask = some_condition(kind)
        sampled = generate_conditioned(model, condition, (3, 4), Sampling(2.0, top_k=1), generators(0, 1), mask)
        flat = sampled.flatten(1)
        nothing = (
            torch.tensor([CLASSES] * 2) if kind == "c2i" else state["cls_embedding.uncond_embedding"].expand(2, -1, -1)
        )
        conditional = llamagen_logits(state, condition, flat, (3, 4), mask)
        unconditional = llamagen_logits(state, nothing, flat, (3, 4), mask)
        assert torch.equal((2 * conditional - unconditional).argmax(-1), flat)
        assert len(flat.unique()) > 3

    @pytest.mark.parametrize("patch_size", [1, 2])
    def test_it_trains_with_patches(self, patch_size):
        model = llamagen_from_weights(llamagen_state("c2i"), "x.pt", num_attention_heads=HEADS).train()
        batch = conditioned_batch(model, some_codes(height=4), None, patch_size)
        model(**batch, condition=torch.tensor([0, 1])).loss.backward()
        assert model.condition.table.weight.grad[:2].abs().sum() > 0
        assert model.backbone.model.layers[0].self_attn.q_proj.weight.grad.abs().sum() > 0

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda s: {"encoder.conv_in.weight": torch.zeros(1)}, "no LlamaGen language model; its tensors are encoder"),
            (lambda s: s | {"layers.1000000.ffn_norm.weight": torch.zeros(1)}, "layers up to 1000000, but only 3 of them"),
            (lambda s: s | {"layers.1.attention.extra.weight": torch.zeros(1)}, "not expected: .*layers.1.attention.extra"),
            (lambda s: {n: v for n, v in s.items() if n != "layers.1.ffn_norm.weight"}, "missing: .*layers.1.post_attention"),
            (lambda s: {n: v for n, v in s.items() if n != "tok_embeddings.weight"}, "has no 'tok_embeddings.weight'"),
            (lambda s: {n: v for n, v in s.items() if "cls" not in n}, "has no 'cls_embedding.uncond_embedding'"),
            (lambda s: s | {"output.weight": torch.zeros(3, WIDTH)}, r"image_head.weight \(3, 32\) instead of \(20, 32\)"),
        ],
    )  # fmt: skip
    def test_bad_weights_are_named(self, change, message):
        with pytest.raises(ValueError, match=message):
            llamagen_from_weights(change(llamagen_state("c2i")), "x.pt", num_attention_heads=HEADS)

    def test_bad_use_is_named(self, tmp_path):
        state = llamagen_state("c2i")
        with pytest.raises(ValueError, match="num_attention_heads: None is not possible for width 32"):
            llamagen_from_weights(state, "x.pt")
        model = llamagen_from_weights(state, "x.pt", num_attention_heads=HEADS)
        batch = conditioned_batch(model, some_codes(), None)
        with pytest.raises(ValueError, match="condition: missing"):
            model(**batch)
        with pytest.raises(ValueError, match=r"condition: need class numbers \(B,\) in \[0, 5\]"):
            model(**batch, condition=torch.tensor([0, 6]))
        with pytest.raises(ValueError, match="generators: 1 given for 2 conditions"):
            generate_conditioned(model, torch.tensor([0, 1]), (3, 4), Sampling(), generators(0))
        with pytest.raises(ValueError, match="samples after a class, not after a prompt"):
            generate_codes(model, [[1]], None, (3, 4), Sampling(), generators(0))
        features = llamagen_from_weights(llamagen_state("t2i"), "x.pt", num_attention_heads=HEADS)
        with pytest.raises(ValueError, match=r"condition: need features \(B, 6, 10\), got \(2, 5, 10\)"):
            features(**conditioned_batch(features, some_codes(), None), condition=torch.zeros(2, 5, FEATURES))


JOINT = {"vocab_size": 70, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "initializer_range": 0.2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip


class TestJointTable:
    @pytest.mark.parametrize("family", ["gemma", "llama"])
    def test_logits_are_rows_of_the_joint_table(self, family, tmp_path):
        torch.manual_seed(0)
        joint = (
            GemmaForCausalLM(GemmaConfig(**JOINT, head_dim=8))
            if family == "gemma"
            else LlamaForCausalLM(LlamaConfig(**JOINT))
        )
        joint.eval().save_pretrained(tmp_path)
        model = split_joint_table(str(tmp_path), codebook_size=20, boi_token_id=3, eoi_token_id=4)
        vocabulary = model.config.vocabulary
        sequence = build_sequence(
            [TextSegment([5, 6, 7]), ImageSegment(some_codes(1)[0]), TextSegment([8])], vocabulary
        )
        ids = sequence.input_ids[None]
        with torch.no_grad():
            ours, theirs = full_forward(model, ids, [(3, 4)]), joint(ids).logits
        torch.testing.assert_close(ours.logits, theirs[..., :50], rtol=0, atol=1e-5)
        torch.testing.assert_close(ours.image_logits, theirs[..., 50:], rtol=0, atol=1e-5)
        start = [*sequence.input_ids[:5].tolist()]
        sampled = generate_codes(model, [start], None, (3, 4), Sampling(top_k=1), generators(0)).flatten()
        before = torch.cat([sequence.input_ids[:5], sampled + 50])[None]
        with torch.no_grad():
            assert torch.equal(joint(before).logits[0, 4:-1, 50:].argmax(-1), sampled)

    @pytest.mark.parametrize(("codebook", "change", "message"), [
        (70, {}, "codebook_size: 70 codes leave no text in the 70 rows"),
        (20, {"mlp_bias": False, "attention_bias": False, "final_logit_softcapping": 30.0}, "a cap on its logits"),
    ])  # fmt: skip
    def test_bad_use_is_named(self, codebook, change, message, tmp_path):
        LlamaForCausalLM(LlamaConfig(**JOINT, **change)).save_pretrained(tmp_path)
        with pytest.raises(ValueError, match=message):
            split_joint_table(str(tmp_path), codebook, 3, 4)

    def test_a_scale_on_the_logits_would_be_lost(self, tmp_path):
        CohereForCausalLM(CohereConfig(**JOINT, logit_scale=0.25)).save_pretrained(tmp_path)
        with pytest.raises(ValueError, match="has a bias, or a scale or a cap on its logits"):
            split_joint_table(str(tmp_path), 20, 3, 4)

    def test_an_incomplete_checkpoint_is_refused(self, tmp_path):
        LlamaForCausalLM(LlamaConfig(**JOINT)).save_pretrained(tmp_path)
        weights = load_file(tmp_path / "model.safetensors")
        del weights["model.norm.weight"]
        save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
        with pytest.raises(ValueError, match=r"only in the model: model\.norm\.weight"):
            split_joint_table(str(tmp_path), 20, 3, 4)

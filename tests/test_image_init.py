"""How new image tables start: moments, similar codes, the first loss, seeds."""

import math

import pytest
import torch
from conftest import inputs_of, tiny_model
from scipy.stats import spearmanr

from unified.model.init import EMBED_KINDS, HEAD_KINDS, initialize_image_tables
from unified.sequence import ImageSegment, TextSegment, build_sequence
from unified.training.config import load_config
from unified.training.setup import build_parts

CODES = 600


def uneven_model(**text):
    """A model whose text tables have another mean and spread in every dimension."""
    model = tiny_model(codebook_size=CODES, text={"vocab_size": 300, "initializer_range": 0.5, **text})
    with torch.no_grad():
        for seed, table in enumerate((model.get_input_embeddings().weight, model.get_output_embeddings().weight)):
            generator = torch.Generator().manual_seed(seed)
            table.mul_(torch.linspace(0.5, 2, 32)).add_(torch.randn(32, generator=generator))
    return model


def codebook(seed=0):
    """Clustered vectors on the sphere: a code's nearest ones are much nearer than the rest."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(CODES // 10, 8, generator=generator).repeat_interleave(10, 0)
    return torch.nn.functional.normalize(centres + 0.1 * torch.randn(CODES, 8, generator=generator), dim=-1)


def initialize(model, embed="text", head="normal", seed=0, vectors=None):
    text, head_weight = model.get_input_embeddings(), model.get_output_embeddings().weight
    initialize_image_tables(
        model.image_embed.weight, model.image_head.weight, text, head_weight, len(text.weight),
        model.config.text_config.initializer_range, embed, head, vectors, torch.Generator().manual_seed(seed),
    )  # fmt: skip
    return model.image_embed.weight.detach().clone(), model.image_head.weight.detach().clone()


def test_moments_follow_the_text_tables():
    model = uneven_model()
    text, scores = (t.weight.detach() for t in (model.get_input_embeddings(), model.get_output_embeddings()))
    noise, head = initialize(model, "text", "text")
    for made, like in ((noise, text), (head, scores)):
        torch.testing.assert_close(made.std(0), like.std(0), rtol=0.15, atol=0)
        assert ((made.mean(0) - like.mean(0)).abs() < 5 * like.std(0) / CODES**0.5).all()
    projected, tied = initialize(model, "codebook", "tied-like", vectors=codebook())
    torch.testing.assert_close(projected.mean(0), text.mean(0), rtol=0, atol=1e-4)
    torch.testing.assert_close(projected.std(0), text.std(0), rtol=1e-4, atol=0)
    torch.testing.assert_close(tied.mean(0), torch.zeros(32), rtol=0, atol=1e-4)
    torch.testing.assert_close(tied.std(0), scores.std(0), rtol=1e-4, atol=0)
    plain, plain_head = initialize(model, "normal", "normal")
    for made in (plain, plain_head):
        assert made.std().item() == pytest.approx(0.5, rel=0.03) and abs(made.mean().item()) < 0.02


def test_similar_codes_start_similar():
    vectors = codebook()
    table, head = initialize(uneven_model(), "codebook", "tied-like", vectors=vectors)
    wanted = torch.pdist(vectors)
    for rows in (table, head):
        assert spearmanr(wanted, torch.pdist(rows)).statistic > 0.9
        distance = torch.cdist(rows, rows).fill_diagonal_(math.inf)
        assert (distance.argmin(1) // 10 == torch.arange(CODES) // 10).float().mean() > 0.95  # in the code's cluster
    unrelated, _ = initialize(uneven_model())
    assert abs(spearmanr(wanted, torch.pdist(unrelated)).statistic) < 0.1


def test_zero_head_starts_at_the_uniform_guess():
    model = uneven_model()
    initialize(model, "codebook", "zero", vectors=codebook())
    vocabulary = model.config.vocabulary
    rows = [build_sequence([TextSegment([5, 6]), ImageSegment(torch.arange(16).reshape(4, 4))], vocabulary)]
    loss = model(**inputs_of(model.config, *rows)).image_loss
    assert loss.item() == pytest.approx(math.log(CODES), rel=1e-6)


@pytest.mark.parametrize("embed", EMBED_KINDS)
@pytest.mark.parametrize("head", HEAD_KINDS)
def test_seeds_decide(embed, head):
    model, vectors = uneven_model(), codebook()
    first = initialize(model, embed, head, 1, vectors)
    with torch.no_grad():
        model.image_embed.weight.fill_(7)
        model.image_head.weight.fill_(7)
    again, other = initialize(model, embed, head, 1, vectors), initialize(model, embed, head, 2, vectors)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])
    assert torch.equal(first[1], other[1]) == (head == "zero")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"embed": "mean"}, "image_init: 'mean' is unknown"),
        ({"head": "codebook"}, "head_init: 'codebook' is unknown"),
        ({"embed": "codebook"}, "image_init: 'codebook' needs code vectors, and the image tokenizer has none"),
        (
            {"embed": "codebook", "vectors": torch.randn(5, 8)},
            r"codebook: shape \(5, 8\) is not one vector for each of",
        ),
        (
            {"embed": "codebook", "vectors": torch.ones(CODES, 8)},
            "codebook: all codes have the same value in a dimension",
        ),
    ],
)
def test_bad_kinds_and_codebooks_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        initialize(uneven_model(), **options)


def test_a_run_takes_its_tokenizers_codebook(config_file, on_a_backbone, image_tokenizer):
    options = ["model.image_init=codebook", "model.head_init=zero"]
    torch.manual_seed(3)
    model, *_ = build_parts(load_config(config_file, ["output_dir=unused", *on_a_backbone, *options]))
    wanted = torch.pdist(image_tokenizer.quantizer.codebook)
    assert spearmanr(wanted, torch.pdist(model.image_embed.weight.detach())).statistic > 0.9
    assert not model.image_head.weight.any()


def test_a_tokenizer_without_codebook_is_refused(config_file, on_a_backbone, monkeypatch):
    monkeypatch.setattr("unified_tokenizers.vq_model.VQModel.codebook_vectors", lambda self: None)
    with pytest.raises(ValueError, match="image_init: 'codebook' needs code vectors, and the image tokenizer has none"):
        build_parts(load_config(config_file, ["output_dir=unused", *on_a_backbone, "model.image_init=codebook"]))


OF_A_PIPELINE = [f"model.{name}=null" for name in ("architecture", "image_tokenizer", "text_tokenizer")] + [
    "model.pipeline=some"
]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.image_init=mean"], "model.image_init: 'mean' is unknown"),
        (["model.head_init=mean"], "model.head_init: 'mean' is unknown"),
        ([*OF_A_PIPELINE, "model.head_init=zero"], "model.head_init: 'zero', but a pipeline has its image tables"),
        ([*OF_A_PIPELINE, "model.image_init=text"], "model.image_init: 'text', but a pipeline has its image tables"),
    ],
)
def test_starts_that_cannot_be_are_refused(config_file, overrides, message):
    with pytest.raises(ValueError, match=message):
        load_config(config_file, ["output_dir=out", *overrides])


def test_a_new_model_takes_its_tokenizers_codebook_too(config_file, image_tokenizer):
    """As transformers starts it without a word about it."""
    torch.manual_seed(3)
    options = ["output_dir=unused", "model.image_init=codebook", "model.head_init=tied-like"]
    model, *_ = build_parts(load_config(config_file, options))
    distances = torch.pdist(image_tokenizer.quantizer.codebook)
    for table in (model.image_embed, model.image_head):
        assert spearmanr(distances, torch.pdist(table.weight.detach())).statistic > 0.9
    torch.manual_seed(3)
    plain, *_ = build_parts(load_config(config_file, ["output_dir=unused"]))
    assert abs(spearmanr(distances, torch.pdist(plain.image_embed.weight.detach())).statistic) < 0.5
    assert torch.equal(
        plain.backbone.model.layers[0].mlp.up_proj.weight, model.backbone.model.layers[0].mlp.up_proj.weight
    )

"""Speculation in any order: the exact joint distribution, the same greedy image, and what is refused."""

import itertools
from contextlib import closing

import numpy as np
import pytest
import torch
from browsing import need_gradio
from conftest import chi_square_p, generators, last, tiny_model, tiny_pipeline

from unified import GenerationOptions
from unified.cli import main
from unified.data.batches import make_batch
from unified.decoding import Sampling, any_order_speculation, generate_codes, make_decoder, passes, speculative
from unified.decoding.any_order_speculation import assd_codes
from unified.decoding.config import DECODING_MODES, check_decoding, modes_for
from unified.decoding.sampling import filter_logits, guide
from unified.sequence import ImageSegment, TextSegment, build_sequence
from unified.serving.engine import Engine
from unified.serving.page import build_demo

GRID, PROMPTS, NEGATIVES = (4, 8), [[1, 5, 6, 3], [1, 7, 3], [1, 8, 9, 10, 3]], [[1, 3]] * 3
ANY = {"order": "random", "size": 3}
WAYS = [ANY, {**ANY, "merge": "channel"}]
every_merge = pytest.mark.parametrize("way", WAYS, ids=["one", "channel"])


def model_of(way, **changes):
    """A tiny model whose codes depend on one another strongly."""
    model = tiny_model(prediction=way, text={"initializer_range": 0.5}, **changes)
    torch.manual_seed(0)
    with torch.no_grad():
        for module in model.image_modules().values():
            for weight in module.parameters():
                weight.normal_(0, 2.0)
    return model


def known_codes():
    """Some codes of three images: scattered ones, rows that cut through merged cells, and all."""
    codes = torch.randint(0, 20, (3, *GRID), generator=generators(0)[0])
    known = torch.full_like(codes, -1)
    known[0, 2:, 3:], known[1, ::3], known[2] = codes[0, 2:, 3:], codes[1, ::3], codes[2]
    return known


@every_merge
@pytest.mark.parametrize("window", [*(pytest.param(few, marks=pytest.mark.process) for few in (2, 3)), 40])
@pytest.mark.parametrize("known", [None, known_codes()], ids=["free", "known"])
def test_the_likeliest_codes_are_those_of_plain_decoding_one_at_a_time(way, window, known):
    """With top_k = 1 nothing is left to chance: context, masks, guidance and the cache have to agree."""
    sampling = Sampling(guidance_scale=3.0, guidance_schedule="cosine", top_k=1)
    cells = 8 if "merge" in way else 32
    options = [PROMPTS, NEGATIVES, GRID, sampling]
    plain = generate_codes(model_of({**way, "size": cells}), *options, generators(0, 1, 2), known=known)
    fast = last(assd_codes(make_decoder(model_of(way)), *options, generators(0, 1, 2), known, window))
    assert torch.equal(fast.view(3, *GRID), plain) and len(plain.unique()) > 10


@every_merge
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.process)])
def test_known_codes_stay_and_an_image_depends_on_its_own(way, dtype):
    decoder, known = make_decoder(tiny_model(prediction=way).to(dtype)), known_codes()
    options = [GRID, Sampling(guidance_scale=2.0, temperature=2.0)]
    together = last(assd_codes(decoder, PROMPTS, NEGATIVES, *options, generators(0, 1, 2), known))
    alone = last(assd_codes(decoder, PROMPTS[1:2], NEGATIVES[1:2], *options, generators(1), known[1:2]))
    free = last(assd_codes(decoder, PROMPTS, NEGATIVES, *options, generators(0, 1, 2)))
    assert torch.equal(together.view(3, *GRID)[known >= 0], known[known >= 0]) and int(together.min()) >= 0
    assert torch.equal(alone[0], together[1]) and len(together[0].unique()) > 4
    assert not torch.equal(free, together) and int(free.min()) >= 0


def test_a_pass_confirms_a_window_if_all_drafts_pass_and_one_cell_if_none_does(monkeypatch):
    model = tiny_model(prediction=ANY)
    with torch.no_grad():
        model.image_head.weight.zero_()  # all codes are as likely in every context
    options = [make_decoder(model), PROMPTS[:1], None, GRID, Sampling()]
    found = [(codes >= 0).sum() for codes in assd_codes(*options, generators(0), window=5)]
    assert found == [1, 6, 11, 16, 21, 26, 31, 32]
    monkeypatch.setattr(any_order_speculation, "accepted", lambda wanted, *given: torch.zeros_like(wanted).bool())
    assert [(codes >= 0).sum() for codes in assd_codes(*options, generators(0), window=5)] == [*range(1, 33)]


# The joint distribution


def tiny_world(way):
    """A model of few codes that depend on one another, and the exact probability of every image in one permutation.

    The reference is the forward pass of training. Returns a decoder, the grid, sampling, images ``(N, h*w)``, their
    probability ``(N,)``, and which codes are counted: of merged cells two each, as there are too many images.
    """
    grid, size, temperature, counted = (2, 2), 4, 8.0, [0, 1, 2, 3]
    if "merge" in way:
        grid, size, temperature, counted = (2, 6), 2, 60.0, [0, 7, 2, 9, 4, 11]
    text = {"num_hidden_layers": 1, "hidden_size": 16, "initializer_range": 0.8}
    model = tiny_model(codebook_size=size, text=text, prediction=way)
    torch.manual_seed(1)
    with torch.no_grad():
        for table in (model.image_embed, model.image_query):
            table.weight.normal_(0, 2.0)
    sampling = Sampling(guidance_scale=1.5, temperature=temperature, top_k=3)
    images, sides, found = torch.tensor(list(itertools.product(range(size), repeat=grid[0] * grid[1]))), [], []
    hook = model.image_head.register_forward_pre_hook(lambda module, given: found.append(given))
    for prompt in (PROMPTS[0], NEGATIVES[0]):
        rows = [
            build_sequence([TextSegment(prompt[1:-1]), ImageSegment(codes.view(grid))], model.config.vocabulary)
            for codes in images
        ]
        for row in rows:
            row.seed = 3
        with torch.no_grad():
            model(**make_batch(rows, model.config).inputs)
        states, targets = found.pop()[:2]
        sides.append((states @ model.image_head.weight.T).detach().flatten(0, -2))
    hook.remove()
    logits = filter_logits(guide(*sides, sampling.guidance_scale), sampling).log_softmax(-1)
    probability = logits.gather(1, targets.reshape(-1, 1)).view(len(images), -1).sum(1).exp()
    return make_decoder(model), grid, sampling, images, probability, counted


@every_merge
@pytest.mark.process
def test_the_joint_distribution_is_exact_and_the_test_can_fail(way, monkeypatch):
    decoder, grid, sampling, images, probability, counted = tiny_world(way)
    assert float(probability.sum()) == pytest.approx(1, abs=1e-5)
    permutation = int(np.random.default_rng(3).integers(2**32, size=1)[0])  # as in training, now for all images
    monkeypatch.setattr(passes, "order_seed", lambda generator: permutation)
    count, place = 600, (images.max() + 1) ** torch.arange(len(counted))
    number = lambda codes: (codes[:, counted] * place).sum(dim=1)  # noqa: E731
    expected = torch.zeros(int(number(images).max()) + 1).index_add(0, number(images), probability)
    assert int((expected * count >= 5).sum()) > 10  # enough to tell distributions apart

    def fit():
        own = generators(*range(count))
        codes = assd_codes(decoder, PROMPTS[:1] * count, NEGATIVES[:1] * count, grid, sampling, own, window=3)
        return chi_square_p(number(last(codes)), expected)

    assert fit() > 0.01
    residual = speculative.residual_codes
    for name, mutant in (
        ("accepted", lambda wanted, offered, verdicts: torch.ones_like(wanted, dtype=torch.bool)),
        ("residual_codes", lambda wanted, offered, verdicts: residual(wanted, torch.zeros_like(offered), verdicts)),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(any_order_speculation, name, mutant)
            assert fit() < 1e-4, name


# What is refused


MODES_OF = {
    ("raster", "one"): ["plain", "jacobi", "sjd", "gsd", "zipar", "autoguided", "coarse_cfg"],
    ("raster", "channel"): ["plain"],
    ("rows", "one"): ["plain", "autoguided", "coarse_cfg"],
    ("locality", "one"): ["plain", "autoguided", "coarse_cfg"],
    ("random", "one"): ["plain", "assd"],
    ("random", "channel"): ["plain", "assd"],
    ("random", "channel", "chained"): ["plain"],
}


@pytest.mark.parametrize("way", MODES_OF, ids=str)
def test_a_mode_that_does_not_suit_the_order_is_refused(way):
    order, merge = way[:2]
    model = tiny_model(prediction={"order": order, "merge": merge, "chained": "chained" in way})
    suitable = MODES_OF[way]
    assert list(modes_for(model.config)) == suitable
    decoder = make_decoder(model)
    for name in DECODING_MODES:
        run = DECODING_MODES[name](decoder, PROMPTS[:1], None, (4, 4), Sampling(), generators(0))
        if name in suitable:
            assert int(last(run).min()) >= 0
            check_decoding(name, model.config)
            continue
        message = f"decoding: '{name}' needs .*; the model has the order '{order}' with merge '{merge}', use one"
        with pytest.raises(ValueError, match=message):
            next(run)


@pytest.mark.process
def test_a_mode_is_refused_before_anything_is_computed(
    text_tokenizer, image_tokenizer, photo, tmp_path, capsys, monkeypatch
):
    """By every way in; with a mode that suits the order each of them generates."""
    pipe = tiny_pipeline(text_tokenizer, image_tokenizer, prediction={"order": "random", "size": 4})
    pipe.save_pretrained(tmp_path / "pipeline")
    codes = pipe("red apple", generator=generators(0), decoding="assd").codes
    assert codes.min() >= 0 and not torch.equal(codes, pipe("red apple", generator=generators(0)).codes)
    start = [
        "generate",
        "--pipeline",
        str(tmp_path / "pipeline"),
        "--prompt",
        "red apple",
        "--out",
        str(tmp_path / "out"),
    ]
    assert main([*start, "--decoding", "assd"]) == 0 and len(list((tmp_path / "out").iterdir())) == 1
    capsys.readouterr()
    with closing(Engine(pipe)) as engine:
        options = GenerationOptions(decoding="assd")
        assert torch.equal(engine.submit("red apple", options, generator=generators(0)).result(30).codes, codes)
        with pytest.raises(ValueError, match="decoding: 'sjd' needs"):
            engine.submit("red apple", GenerationOptions(decoding="sjd"))
        need_gradio()
        (menu,) = (block for block in build_demo(engine).blocks.values() if block.elem_id == "decoding")
        assert [name for _, name in menu.choices] == ["plain", "assd"]
    message = (
        "decoding: 'sjd' needs the order 'raster' with merge 'one', without tokens between codes; the model has the order "
        "'random' with merge 'one', "
    )
    message += "use one of ('plain', 'assd')."
    for name in ("decoder", "enable_fast_decoding", "to"):
        monkeypatch.setattr(type(pipe), name, lambda *given, **options: pytest.fail("too late"))
    monkeypatch.setattr(type(image_tokenizer), "encode", lambda *given: pytest.fail("too late"))
    for ask in (
        lambda **given: pipe("red apple", **given),
        lambda **given: pipe.stream("red apple", **given),
        lambda **given: pipe.inpaint("red apple", photo, photo, **given),
        lambda **given: pipe.variation("red apple", photo, **given),
    ):
        with pytest.raises(ValueError) as refused:
            ask(decoding="sjd")
        assert str(refused.value) == message
    assert main([*start, "--decoding", "sjd", "--int8"]) == 2
    assert capsys.readouterr().err.endswith(f"\nunified generate: {message}\n")


def test_a_window_below_two_is_named():
    with pytest.raises(ValueError, match="window: 1 must be at least 2"):
        next(assd_codes(make_decoder(tiny_model(prediction=ANY)), PROMPTS, None, GRID, Sampling(), generators(0, 1, 2),
                        window=1))  # fmt: skip

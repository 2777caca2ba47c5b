"""Cached decoding against a loop without cache; samplers; noise."""

import pytest
import torch
from conftest import generators, last, naive_codes, tiny_model

from unified.decoding import DECODING_MODES, Prompt, Sampling, generate_codes, generate_conditioned, make_decoder
from unified.decoding import sampling as sampling_module
from unified.decoding.batch_rows import Request
from unified.decoding.continuous_batching import Batcher
from unified.decoding.decode import iterate_codes
from unified.decoding.sampling import LogitFilter, filter_logits, guide, gumbel_noise, sample_codes, sample_gumbel
from unified.decoding.speculative import jacobi_codes
from unified.decoding.staggered_rows import zipar_codes
from unified.prediction.plan import RASTER


@pytest.mark.parametrize("positions", ["1d", "2d"])
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(guidance_scale=2.5, top_k=7, temperature=0.8)])
@torch.no_grad()
def test_cached_equals_full_forward(threads, positions, sampling):
    model = tiny_model(positions=positions)
    prompts, negatives = [[1, 5, 6, 7, 3], [1, 8, 3]], [[1, 3], [1, 9, 9, 9, 9, 9, 3]]
    grid = (2, 4)
    cached = generate_codes(model, prompts, negatives, grid, sampling, generators(0, 1))
    for row in range(2):
        expected = naive_codes(model, prompts[row], negatives[row], grid, sampling, *generators(row))
        assert cached[row].flatten().tolist() == expected


@pytest.mark.parametrize("shape", ["random", "first", "last", "all"])
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(guidance_scale=2.0, top_k=7)])
@torch.no_grad()
def test_runs_of_known_codes_take_one_pass(shape, sampling):
    model, grid = tiny_model(positions="2d"), (4, 4)
    prompts, negatives = [[1, 5, 6, 7, 3], [1, 8, 3]], [[1, 3], [1, 9, 9, 3]]
    generator = generators(5)[0]
    known = torch.randint(20, (2, 16), generator=generator)
    if shape == "random":
        sampled = torch.rand(16, generator=generator) < 0.4
        known[:, sampled] = -1
        known[0, 3], known[1, 3] = -1, 6  # known in one row alone
    elif shape != "all":
        known[:, {"first": slice(9, None), "last": slice(7)}[shape]] = -1
    decoder = make_decoder(model)
    run, widths, seen = decoder._forward, [], []
    decoder._forward = lambda embeds, *rest: widths.append(embeds.shape[1]) or run(embeds, *rest)
    codes = generate_codes(decoder, prompts, negatives, grid, sampling, generators(0, 1),
                           lambda i, c: seen.append((i, c.shape[1])), known=known.reshape(2, 4, 4))  # fmt: skip
    for row in range(2):
        expected = naive_codes(model, prompts[row], negatives[row], grid, sampling, *generators(row), known[row])
        assert codes[row].flatten().tolist() == expected
    assert seen == [(i, i + 1) for i in range(16)]
    free = (known < 0).any(dim=0)
    free[0] = True  # the first code starts a pass in any case
    runs = (free.nonzero().flatten().diff(append=torch.tensor([16]))).tolist()
    assert widths[1:] == runs[:-1]  # after the prompt; what follows the last code sampled needs no pass


def test_a_row_does_not_depend_on_its_batch():
    model = tiny_model()
    sampling = Sampling(guidance_scale=2.0)
    together = generate_codes(model, [[1, 5, 3], [1, 6, 7, 8, 3]], [[1, 3]] * 2, (4, 4), sampling, generators(3, 4))
    alone = generate_codes(model, [[1, 6, 7, 8, 3]], [[1, 3]], (4, 4), sampling, generators(4))
    assert torch.equal(together[1], alone[0])


def test_callback_sees_every_code():
    seen = []
    codes = generate_codes(
        tiny_model(), [[1, 3]], None, (2, 2), Sampling(), generators(0), lambda i, c: seen.append((i, c.tolist()))
    )
    flat = codes.flatten().tolist()
    assert seen == [(i, [flat[: i + 1]]) for i in range(4)]


def test_gumbel_max_samples_the_softmax():
    logits = torch.tensor([[0.0, 1.0, 2.0, -1.0]])
    generator = generators(0)
    samples = torch.cat([(logits + gumbel_noise(generator, 4, logits.device)).argmax(-1) for _ in range(20000)])
    share = torch.bincount(samples, minlength=4) / 20000
    torch.testing.assert_close(share, logits[0].softmax(-1), rtol=0, atol=0.015)


def test_filters():
    logits = torch.tensor([[3.0, 2.0, 1.0, 0.0]])
    assert filter_logits(logits, Sampling(top_k=2)).isfinite().tolist() == [[True, True, False, False]]
    probability = logits.softmax(-1)[0]
    top_p = float(probability[0]) + 0.01  # needs the second code as well
    assert filter_logits(logits, Sampling(top_p=top_p)).isfinite().tolist() == [[True, True, False, False]]
    assert filter_logits(logits, Sampling(top_p=0.01)).isfinite().tolist() == [[True, False, False, False]]
    assert filter_logits(logits, Sampling(temperature=0.5)).tolist() == [[6.0, 4.0, 2.0, 0.0]]


@pytest.mark.parametrize("spread", [0.1, 1.0, 5.0])
@pytest.mark.parametrize("sampling", [Sampling(top_k=10, temperature=0.7), Sampling(top_k=40), Sampling(top_k=63)])
def test_a_large_top_k_without_its_threshold_samples_the_same(sampling, spread):
    generator = generators(0)[0]
    logits = (torch.randn(500, 64, generator=generator) * spread).round(decimals=1)  # with ties
    noise = gumbel_noise([generator], 500 * 64, logits.device).reshape(500, 64)
    filtered = filter_logits(logits, sampling)
    assert torch.equal(sample_codes(logits, sampling, noise), sample_gumbel(filtered, noise))
    if spread <= 1 and sampling.top_k < 63:  # the filter matters here
        assert not torch.equal(sample_gumbel(logits / sampling.temperature, noise), sample_gumbel(filtered, noise))
    with pytest.raises(ValueError, match="logits: NaN or infinite"):
        sample_codes(logits.index_fill(1, torch.tensor([3]), float("nan")), sampling, noise)


@pytest.mark.parametrize(
    ("place", "settings"),
    [("first", Sampling()), ("last", Sampling(guidance_scale=2.0, top_k=12))],  # 12 of 20: without a threshold
)
def test_a_new_filter_acts_wherever_codes_are_sampled(monkeypatch, settings, place):
    """One that keeps even ids alone: plain, after a class, in a running batch, in every mode, and in text."""
    model, grid = tiny_model(), (2, 4)
    decoder = make_decoder(model)
    prompts, negatives = [[1, 5, 6, 3], [1, 8, 3]], [[1, 3]] * 2
    any_order = tiny_model(prediction={"order": "random", "size": 8})
    classes = tiny_model(positions="llamagen", conditioning={"kind": "class", "classes": 5})

    def sampled() -> dict[str, torch.Tensor]:
        result = {"class": generate_conditioned(classes, torch.tensor([0, 3]), grid, settings, generators(0, 1))}
        for name, decode in DECODING_MODES.items():
            suitable = decoder if decode.suits(RASTER) else make_decoder(any_order)
            *_, result[name] = decode(suitable, prompts, negatives, grid, settings, generators(0, 1))
        images = [
            Request(Prompt(tuple(row)), grid, generator, settings, negative=Prompt((1, 3)))
            for row, generator in zip(prompts, generators(0, 1), strict=True)
        ]
        texts = [
            Request(Prompt((1, 5)), grid, generator, text_sampling=settings, max_new_tokens=12, max_images=0)
            for generator in generators(*range(8))
        ]
        (one,), (other,), *written = Batcher(decoder, 12, 30).run([*images, *texts])
        words = [token for segments in written for segment in segments for token in segment.ids]
        return {**result, "batch": torch.stack([one.codes, other.codes]), "text": torch.tensor(words)}

    assert all((ids % 2 == 1).any() for ids in sampled().values())
    even = LogitFilter(lambda logits, _: logits.index_fill(-1, torch.arange(1, logits.shape[-1], 2), -torch.inf), bool)
    filters = sampling_module.FILTERS
    monkeypatch.setattr(sampling_module, "FILTERS", [even, *filters] if place == "first" else [*filters, even])
    for name, ids in sampled().items():
        assert len(ids) and (ids % 2 == 0).all(), name


@pytest.mark.parametrize(
    ("field", "value"), [("guidance_scale", 0.5), ("temperature", 0.0), ("top_k", -1), ("top_p", 0.0), ("top_p", 1.5)]
)
def test_bad_sampling_is_named(field, value):
    with pytest.raises(ValueError, match=f"{field}: {value}"):
        Sampling(**{field: value})


@pytest.mark.parametrize("row", [[float("nan"), 0.0], [float("inf"), 0.0], [-float("inf"), -float("inf")]])
def test_logits_that_are_not_finite_are_refused(row):
    with pytest.raises(ValueError, match="logits: NaN or infinite"):
        sample_gumbel(torch.tensor([[0.0, 1.0], row]), torch.zeros(2, 2))
    assert sample_gumbel(torch.tensor([[0.0, -float("inf")]]), torch.zeros(1, 2)).tolist() == [
        0
    ]  # a filtered code is fine


def test_guidance_is_computed_in_float32_and_keeps_the_dtype():
    one, other = torch.tensor([[1.0, 3.0]]), torch.tensor([[0.3, 2.0]])
    scale = torch.tensor([[2.7]])
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        a, b = one.to(dtype), other.to(dtype)
        expected = (b.double() + 2.7 * (a.double() - b.double())).to(dtype)
        assert torch.equal(guide(a, b, scale), expected) and torch.equal(guide(a, b, 2.7), expected)


def test_noise_of_values_near_one_is_finite_and_exact():
    uniform = torch.rand(4096, generator=generators(0)[0], dtype=torch.float64)
    expected = -(-uniform.log()).log()
    torch.testing.assert_close(
        gumbel_noise(generators(0), 4096, uniform.device)[0].double(), expected, rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize(
    ("prompts", "negatives", "seeds", "message"),
    [
        ([[1, 3]], None, [0], "negative_prompts: guidance needs one row per prompt"),
        ([], [], [], "prompts: need one or more rows"),
        ([[1, 3], []], [[3], [3]], [0, 1], "of at least one id"),
        ([[1, 3]], [[]], [0], "of at least one id"),
        ([[1, 3]], [[3]], [0, 1], "generators: 2 given for 1 prompts"),
    ],
)
def test_prompts_that_cannot_be_continued_are_named(prompts, negatives, seeds, message):
    decoder, sampling = make_decoder(tiny_model()), Sampling(guidance_scale=2.0)
    for mode in (iterate_codes, jacobi_codes, zipar_codes):
        with pytest.raises(ValueError, match=message):
            last(mode(decoder, prompts, negatives, (2, 2), sampling, generators(*seeds)))

"""Speculative decoding: the same image (jacobi), the same distribution (sjd), and a test that tells gsd from it."""

import itertools

import pytest
import torch
from conftest import chi_square_p, full_forward, generators, last, tiny_model

from unified.decoding import Sampling, generate_codes, make_decoder, speculative
from unified.decoding.sampling import filter_logits, guide
from unified.decoding.speculative import speculate_codes

PROMPTS, NEGATIVES = [[1, 5, 6, 7, 3], [1, 8, 3]], [[1, 3], [1, 9, 9, 9, 3]]


@pytest.mark.parametrize("window", [2, 5, 40])
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(guidance_scale=2.0, top_k=5, guidance_schedule="linear")])
def test_jacobi_samples_the_image_of_plain_decoding(window, sampling):
    decoder = make_decoder(tiny_model())
    plain = generate_codes(decoder, PROMPTS, NEGATIVES, (4, 4), sampling, generators(0, 1))
    fast = last(
        speculate_codes(decoder, PROMPTS, NEGATIVES, (4, 4), sampling, generators(0, 1), mode="jacobi", window=window)
    )
    assert torch.equal(fast.reshape(2, 4, 4), plain)


@pytest.mark.parametrize("mode", ["jacobi", "sjd", "gsd"])
def test_half_precision_with_guidance(mode):
    decoder = make_decoder(tiny_model().bfloat16())
    sampling = Sampling(guidance_scale=2.0)
    codes = last(speculate_codes(decoder, PROMPTS, NEGATIVES, (4, 4), sampling, generators(0, 1), mode=mode, window=3))
    assert int(codes.min()) >= 0 and len(codes.unique()) > 4


def test_jacobi_saves_passes_where_the_context_hardly_matters():
    """A model whose logits do not depend on the codes confirms every draft: the first code, then windows of 5."""
    model = tiny_model()
    with torch.no_grad():
        model.image_embed.weight.copy_(model.image_embed.weight[:1].expand_as(model.image_embed.weight))
    options = {"grid": (4, 4), "sampling": Sampling(temperature=0.05), "generators": generators(0)}
    passes = [codes.shape[1] for codes in speculate_codes(make_decoder(model), PROMPTS[:1], None, **options,
                                                          mode="jacobi", window=5)]  # fmt: skip
    assert len(passes) <= 10 and passes[-1] == 16


def tiny_world():
    """A model of 4 codes on a grid of 2 x 2, and the exact probability of each of its 256 images."""
    model = tiny_model(codebook_size=4, text={"num_hidden_layers": 1, "hidden_size": 16, "initializer_range": 0.8})
    sampling = Sampling(guidance_scale=1.5, temperature=6.0, top_k=3)
    images = list(itertools.product(range(4), repeat=4))
    sides = []
    for prompt in (PROMPTS[0], NEGATIVES[0]):
        ids = torch.tensor([[*prompt, *(50 + c for c in image)] for image in images])
        with torch.no_grad():
            output = full_forward(model, ids, [(2, 2)])
        sides.append(output.image_logits[:, len(prompt) - 1 : -1])
    log_probability = filter_logits(guide(*sides, sampling.guidance_scale), sampling).log_softmax(-1)
    probability = log_probability.gather(-1, torch.tensor(images)[..., None]).squeeze(-1).sum(1).exp()
    return make_decoder(model), sampling, probability


def samples(decoder, sampling, count, **options):
    """Images as numbers in base 4, from seeds 0, 1, 2, ..."""
    codes = last(
        speculate_codes(decoder, PROMPTS[:1] * count, NEGATIVES[:1] * count, (2, 2), sampling,
                        generators(*range(count)), **options)
    )  # fmt: skip
    return (codes * torch.tensor([64, 16, 4, 1])).sum(1)


@pytest.mark.process
def test_sjd_samples_the_distribution_and_the_test_can_fail(monkeypatch):
    decoder, sampling, probability = tiny_world()
    assert float(probability.sum()) == pytest.approx(1, abs=1e-5)
    assert int((probability * 1000 >= 5).sum()) > 20  # enough cells to tell distributions apart
    assert chi_square_p(samples(decoder, sampling, 1000, mode="sjd", window=3), probability) > 0.01
    # The inexact mode must be found out, and so must slips: another q than new positions were sampled from, and sampling
    # again from p instead of the residual of p over q.
    assert chi_square_p(samples(decoder, sampling, 1000, mode="gsd", window=3, group_size=2), probability) < 1e-4
    draft = speculative._Judge._draft

    def draft_with_another_proposal(self, positions, *given):
        draft(self, positions, *given)
        self.proposal[-len(positions) :] = self.proposal[-len(positions) :].flip(-1)

    with monkeypatch.context() as patch:
        patch.setattr(speculative._Judge, "_draft", draft_with_another_proposal)
        assert chi_square_p(samples(decoder, sampling, 1000, mode="sjd", window=3), probability) < 1e-4
    residual = speculative.residual_codes
    monkeypatch.setattr(
        speculative, "residual_codes", lambda p, q, verdicts: residual(p, torch.zeros_like(q), verdicts)
    )
    assert chi_square_p(samples(decoder, sampling, 1000, mode="sjd", window=3), probability) < 1e-4


def test_groups_of_one_are_sjd():
    decoder = make_decoder(tiny_model())
    options = [decoder, PROMPTS, NEGATIVES, (4, 4), Sampling(guidance_scale=2.0, temperature=2.0)]
    exact = last(speculate_codes(*options, generators(0, 1), mode="sjd"))
    assert torch.equal(last(speculate_codes(*options, generators(0, 1), mode="gsd", group_size=1)), exact)
    assert not torch.equal(last(speculate_codes(*options, generators(0, 1), mode="gsd", group_size=20)), exact)


def test_groups_are_the_nearest_codes_whatever_the_parts_and_are_made_once(monkeypatch):
    embedding = torch.randn(50, 8, generator=generators(0)[0])
    distance = (embedding[:, None].double() - embedding.double()).square().sum(-1)
    expected = distance.argsort(dim=1)[:, :5]
    for rows in (7, 25, 1024):
        assert torch.equal(speculative._groups(embedding, 5, rows), expected)
    decoder, made = make_decoder(tiny_model()), []
    make = speculative._groups
    monkeypatch.setattr(speculative, "_groups", lambda *given: made.append(given[1]) or make(*given))
    for size in (3, 3, 4, 3):
        last(speculate_codes(decoder, PROMPTS, None, (2, 2), Sampling(), generators(0, 1), mode="gsd", group_size=size))
    assert made == [3, 4]


@pytest.mark.parametrize("mode", ["jacobi", "sjd", "gsd"])
def test_forced_codes_stay_and_an_image_depends_on_its_own(mode):
    decoder = make_decoder(tiny_model())
    known = torch.full((2, 4, 4), -1)
    known[:, 1:3, ::2] = torch.tensor([7, 11])
    options = {"sampling": Sampling(guidance_scale=2.0), "mode": mode, "grid": (4, 4)}
    both = last(speculate_codes(decoder, PROMPTS, NEGATIVES, generators=generators(0, 1), known=known, **options))
    assert torch.equal(both.reshape(2, 4, 4)[known >= 0], known[known >= 0])
    alone = last(
        speculate_codes(decoder, PROMPTS[1:], NEGATIVES[1:], generators=generators(1), known=known[1:], **options)
    )
    assert torch.equal(alone[0], both[1]) and int(both.min()) >= 0
    if mode == "jacobi":
        plain = generate_codes(decoder, PROMPTS, NEGATIVES, (4, 4), options["sampling"], generators(0, 1), known=known)
        assert torch.equal(both.reshape(2, 4, 4), plain)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"mode": "magic"}, "decoding: 'magic' is unknown"), ({"window": 1}, "window, group_size: 1 and 16"),
     ({"group_size": 0}, "window, group_size: 16 and 0")],
)  # fmt: skip
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        last(
            speculate_codes(make_decoder(tiny_model()), PROMPTS, None, (2, 2), Sampling(), generators(0, 1), **options)
        )

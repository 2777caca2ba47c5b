"""Screened draws against the whole head, code for code."""

import pytest
import torch
from conftest import generators, tiny_model

from unified.decoding import Sampling, generate_codes, make_decoder
from unified.decoding.sampler import draw, filter_logits
from unified.decoding.screen import Screen

CODES, WIDTH, STATES = 512, 48, 1000


def world(spread: float):
    """A head whose logits have a standard deviation of ``spread``, states and noise."""
    (generator,) = generators(0)
    weight = torch.randn(CODES, WIDTH, generator=generator) * torch.rand(CODES, 1, generator=generator)
    states = torch.randn(STATES, WIDTH, generator=generator)
    states *= spread / (states @ weight.T).std()
    return weight, states, -(-torch.rand(STATES, CODES, generator=generator).log()).log()


def wrong(screen, weight, states, noise, sampling) -> int:
    """States for which the screen does not name the code of the whole head."""
    expected = draw(filter_logits(states @ weight.T, sampling), noise).tolist()
    drawn = [screen.draw(state, sampling, own) for state, own in zip(states, noise, strict=True)]
    return sum(code is None or int(code) != right for code, right in zip(drawn, expected, strict=True))


@pytest.mark.parametrize(
    ("spread", "sampling"),
    [(0.5, Sampling()), (3.0, Sampling(top_k=60)), (0.5, Sampling(top_k=7, temperature=0.7)), (3.0, Sampling(top_k=1))],
)
def test_screened_draws_are_those_of_the_whole_head_and_the_bound_is_needed(spread, sampling):
    weight, states, noise = world(spread)
    screen = Screen(weight)
    assert wrong(screen, weight, states, noise, sampling) == 0
    screen._bound /= 50
    assert wrong(screen, weight, states[:300], noise[:300], sampling) > 0


def test_the_bound_holds_for_every_logit():
    weight, states, _ = world(1.0)
    weight[3], states[0] = 0.0, 0.0
    screen = Screen(weight)
    for state in states[:100]:
        logits, bound = screen.bounded_logits(state)
        assert ((logits.double() - weight.double() @ state.double()).abs() <= bound).all()


def test_infinite_states_are_refused():
    screen = Screen(world(1.0)[0])
    for value in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="logits: NaN or infinite"):
            screen.draw(torch.full((WIDTH,), value), Sampling(), torch.zeros(CODES))


def test_too_many_candidates_take_the_whole_head():
    """A flat head: every code may win, and the noise decides among the exact logits."""
    model = tiny_model(codebook_size=4096)
    with torch.no_grad():
        model.image_head.weight[:] = model.image_head.weight[:1]
    decoder = make_decoder(model)
    hidden, noise = torch.randn(1, 32, generator=generators(0)[0]), torch.zeros(1, 4096)
    noise[0, 5] = 1e3
    assert decoder._screen is not None
    assert decoder.draw(hidden, Sampling(), noise).tolist() == [5]
    assert (
        decoder._screen.draw(-hidden if (hidden @ model.image_head.weight[0]) > 0 else hidden, Sampling(), noise[0] * 0)
        is None
    )


@torch.no_grad()
def test_pictures_are_the_same(monkeypatch):
    decoder = make_decoder(tiny_model(codebook_size=4096))
    for sampling in (Sampling(guidance_scale=2.0, top_k=300), Sampling(top_p=0.9)):
        options = [[[1, 5, 3]], [[1, 3]], (4, 4), sampling]
        screened = generate_codes(decoder, *options, generators(1))
        with monkeypatch.context() as patch:
            patch.setattr(decoder, "_screen", None)
            assert torch.equal(generate_codes(decoder, *options, generators(1)), screened)

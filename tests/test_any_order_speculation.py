"""Speculation in any order: the exact joint distribution, the same greedy image, and what is refused."""

import itertools
from contextlib import closing

import numpy as np
import pytest
import torch
from conftest import chi_square_p, generators, last, tiny_model, tiny_pipeline

from unified import GenerationOptions
from unified.cli import main
from unified.data.batches import make_batch
from unified.decoding import Sampling, any_order_speculation, generate_codes, make_decoder, passes, speculative
from unified.decoding.any_order_speculation import assd_codes
from unified.decoding.config import DECODING_MODES, check_decoding, modes_for
from unified.decoding.sampling import filter_logits, guide
from unified.prediction.plan import Prediction
from unified.sequence import ImageSegment, TextSegment, build_sequence
from unified.serving.engine import Engine

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
@pytest.mark.parametrize("window", [2, 3, 40])
@pytest.mark.parametrize("known", [None, known_codes()], ids=["free", "known"])
def test_the_likeliest_codes_are_those_of_plain_decoding_one_at_a_time(way, window, known):
    """With top_k = 1 nothing is left to chance: context, masks, guidance and the cache have to agree."""
    sampling = Sampling(guidance_scale=3.0, guidance_schedule="cosine", top_k=1)
    cells = 8 if "merge" in way else 32
    options = [PROMPTS, NEGATIVES, GRID, sampling]
    plain = generate_codes(model_of({**way, "size": cells}), *options, generators(0, 1, 2), known=known)
    fast = last(assd_codes(make_decoder(model_of(way)), *options, generators(0, 1, 2), known, window))
    assert torch.equal(fast.view(3, *GRID), plain) and len(plain.unique()) > 10


# The joint distribution


def tiny_world(way):
    """A model of few codes, and the exact probability of each image in the order of one permutation.

    The reference is the forward pass of training, over all images.
    """
    side = 2 if "merge" in way else 1
    grid, size = ((2, 4), 2) if side == 2 else ((2, 2), 4)
    text = {"num_hidden_layers": 1, "hidden_size": 16, "initializer_range": 0.8}
    model = tiny_model(codebook_size=size, text=text, prediction=way)
    sampling = Sampling(guidance_scale=1.5, temperature=6.0, top_k=3)
    images = torch.tensor(list(itertools.product(range(size), repeat=grid[0] * grid[1])))
    sides = []
    for prompt in (PROMPTS[0], NEGATIVES[0]):
        rows = [
            build_sequence([TextSegment(prompt[1:-1]), ImageSegment(codes.view(grid))], model.config.vocabulary)
            for codes in images
        ]
        for row in rows:
            row.seed = 3
        found = []
        hook = model.image_head.register_forward_pre_hook(lambda module, given: found.append(given))  # noqa: B023
        with torch.no_grad():
            model(**make_batch(rows, model.config).inputs)
        hook.remove()
        states, targets = found[0][:2]
        sides.append(states.flatten(0, -2) @ model.image_head.weight.T)
    logits = filter_logits(guide(*sides, sampling.guidance_scale), sampling).log_softmax(-1)
    probability = logits.gather(1, targets.reshape(-1, 1)).view(len(images), -1).sum(1).exp()
    return make_decoder(model), grid, sampling, images, probability.detach()


@every_merge
@pytest.mark.process
def test_the_joint_distribution_is_exact_and_the_test_can_fail(way, monkeypatch):
    decoder, grid, sampling, images, probability = tiny_world(way)
    assert float(probability.sum()) == pytest.approx(1, abs=1e-5)
    assert int((probability * 1000 >= 5).sum()) > 20  # enough images to tell distributions apart
    permutation = int(np.random.default_rng(3).integers(2**32, size=1)[0])  # as in training, for all images
    monkeypatch.setattr(passes, "_order_seed", lambda generator: permutation)
    place = (images.max() + 1) ** torch.arange(images.shape[1]).flip(0)

    def fits(count=1000):
        own = generators(*range(count))
        codes = last(assd_codes(decoder, PROMPTS[:1] * count, NEGATIVES[:1] * count, grid, sampling, own, window=3))
        print('P', value := chi_square_p((codes * place).sum(1), probability))
        return value

    fits()
    accepted, residual = speculative.accepted, speculative.residual_codes
    mutants = {
        "accepted": [
            lambda wanted, offered, verdicts: torch.ones_like(wanted, dtype=torch.bool),
            lambda wanted, offered, verdicts: accepted(offered, wanted, verdicts),
        ],
        "residual_codes": [lambda wanted, offered, verdicts: residual(wanted, torch.zeros_like(offered), verdicts)],
    }
    for name, others in mutants.items():
        for other in others:
            with monkeypatch.context() as patch:
                patch.setattr(any_order_speculation, name, other)
                print(name); fits()

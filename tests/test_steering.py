"""Sampling steered by reward adapters: logits of the model plus weighted log-probabilities of each."""

import pytest
import torch
from conftest import full_forward, generators, noisy_adapter, tiny_model

from unified.decoding import Sampling, generate_codes, make_decoder
from unified.decoding.batch_rows import Request
from unified.decoding.continuous_batching import Batcher
from unified.decoding.prefill import Prompt
from unified.decoding.sampling import filter_logits, guide, gumbel_noise
from unified.decoding.steering import steer
from unified.lora.adapters import attach_lora, load_lora
from unified.lora.base import base_of
from unified.lora.switching import adapters_off, is_disabled, set_adapters, switch

GRID = (2, 3)
ROWS, NEGATIVES = [Prompt((1, 5, 6, 3)), Prompt((1, 9, 3))], [Prompt((1, 3))] * 2
WEIGHTS = {"one": 0.7, "two": -0.4}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    path, model = tmp_path_factory.mktemp("steering"), tiny_model()
    for seed, name in enumerate(("one", "two", "tables")):
        noisy_adapter(model, path / name, seed, train_image_tables=name == "tables")
    return path


def loaded(folders, *names, **changes):
    model = tiny_model(**changes)
    for name in names:
        model = load_lora(model, folders / name, name)
    return model


@torch.no_grad()
def guided(model, row, negative, codes, scale):
    """Logits of the next code by full forward passes; codes to come are hidden by causality."""
    sides = []
    for ids in (row.ids, negative.ids):
        rest = [50 + code for code in codes] + [50] * (GRID[0] * GRID[1] - len(codes))
        output = full_forward(base_of(model), [*ids, *rest], [GRID])
        sides.append(output.image_logits[:, len(ids) - 1 + len(codes)])
    return guide(*sides, scale)


def naive(model, row, negative, sampling, generator, weights):
    """One code after the other, every log-probability spelled out; the model itself is that without an adapter."""
    codes = []
    while len(codes) < GRID[0] * GRID[1]:
        with adapters_off(model):
            total = guided(model, row, negative, codes, sampling.guidance_scale)
        for name, weight in weights.items():
            set_adapters(model, [name], [1.0])
            total = total + weight * guided(model, row, negative, codes, sampling.guidance_scale).log_softmax(-1)
        noise = gumbel_noise([generator], 20, total.device)
        codes.append(int((filter_logits(total, sampling) + noise).argmax()))
    return codes


@pytest.mark.process
@pytest.mark.parametrize(
    "sampling", [Sampling(), Sampling(guidance_scale=2.0, temperature=0.6)], ids=["plain", "guided"]
)
def test_codes_are_those_of_logits_plus_log_probabilities(folders, sampling):
    model = loaded(folders, "one", "two")
    expected = [
        naive(model, row, negative, sampling, generator, WEIGHTS)
        for row, negative, generator in zip(ROWS, NEGATIVES, generators(3, 4), strict=True)
    ]
    switch(model, False)
    decoder = steer(model, WEIGHTS)
    codes = generate_codes(decoder, ROWS, NEGATIVES, GRID, sampling, generators(3, 4))
    assert codes.flatten(1).tolist() == expected
    plain = generate_codes(make_decoder(base_of(model)), ROWS, NEGATIVES, GRID, sampling, generators(3, 4))
    assert not torch.equal(codes, plain)
    nothing = steer(model, {"one": 0.0})
    assert torch.equal(generate_codes(nothing, ROWS, NEGATIVES, GRID, sampling, generators(3, 4)), plain)


@pytest.mark.parametrize("order", ["raster", "diagonals", "random"])
def test_the_running_batch_samples_the_same_steered_images(order):
    model = tiny_model(prediction={"order": order})
    adapted = attach_lora(model, rank=2)
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in adapted.parameters():
            if weight.requires_grad:
                weight.normal_(0, 0.3)
    switch(adapted, False)
    decoder, sampling = steer(adapted, {"default": 1.5}), Sampling(guidance_scale=1.5)
    alone = generate_codes(decoder, ROWS, NEGATIVES, GRID, sampling, generators(3, 4))
    requests = [
        Request(row, GRID, generator, sampling, negative=negative)
        for row, negative, generator in zip(ROWS, NEGATIVES, generators(3, 4), strict=True)
    ]
    together = [segments[0].codes for segments in Batcher(decoder, 4, 40).run(requests)]
    assert torch.equal(torch.stack(together), alone)
    base = generate_codes(make_decoder(model), ROWS, NEGATIVES, GRID, sampling, generators(3, 4))
    assert not torch.equal(alone, base)


@pytest.mark.process
def test_adapters_are_set_as_before_afterwards(folders):
    model = loaded(folders, "one", "two")
    set_adapters(model, ["two"], [0.5])
    before = generate_codes(make_decoder(base_of(model)), ROWS, None, GRID, Sampling(), generators(1, 2))
    steer(model, {"one": 1.0})
    after = generate_codes(make_decoder(base_of(model)), ROWS, None, GRID, Sampling(), generators(1, 2))
    assert torch.equal(before, after) and not is_disabled(model)
    switch(model, False)
    steer(model, {"one": 1.0})
    assert is_disabled(model)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({}, "steer: no adapter is named"),
        ({"one": float("nan")}, "steer.one: nan is not a finite number"),
        ({"three": 1.0}, "'three'"),
        ({"tables": 1.0}, "'tables' has its own embedding"),
    ],
)
def test_what_cannot_steer_is_refused(folders, weights, message):
    model = loaded(folders, "one", "tables")
    set_adapters(model, ["one"], [1.0])
    with pytest.raises(ValueError, match=message):
        steer(model, weights)
    assert not is_disabled(model) and model.active_adapter == "one"

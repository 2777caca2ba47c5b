"""Rollouts: the log-probabilities of sampling are those of the training forward pass, in every order and merge."""

import pytest
import torch
from conftest import generators, tiny_model
from test_next_x import GRID, every_way, model_of

from unified.decoding import Prompt, Sampling, generate_codes
from unified.decoding.decode import generate_scored
from unified.lora.adapters import attach_lora
from unified.training.rollouts import Arranged, check_rollout, sample_rollout

pytestmark = pytest.mark.process

ROWS = [Prompt((1, 5, 6, 3)), Prompt((1, 5, 6, 3)), Prompt((1, 9, 7, 8, 11, 3))]
NEGATIVES = [Prompt((1, 3))] * 3
SAMPLINGS = {
    "plain": Sampling(),
    "tempered": Sampling(temperature=0.7),
    "guided": Sampling(guidance_scale=2.5, temperature=1.3),
    "rising": Sampling(guidance_scale=3.0, guidance_schedule="linear", temperature=1.6, group_temperature=0.7),
}


def rolled_out(model, sampling, grid=GRID, batch_size=2):
    return sample_rollout(model, ROWS, NEGATIVES, grid, sampling, [4, 5, 6], batch_size)


@every_way
@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS)
def test_log_probabilities_of_sampling_are_those_of_training(way, sampling):
    model = model_of(way)
    with torch.no_grad():
        model.image_head.weight *= 0.03 if way.get("chained") else 0.06  # logits of a few units: float32 resolves 1e-6
    rollout = rolled_out(model, sampling)
    trained = Arranged(rollout, model.config, model.device).log_probs(model)
    assert rollout.log_probs.std() > 0.1  # codes differ
    torch.testing.assert_close(trained.view_as(rollout.log_probs), rollout.log_probs, rtol=0, atol=1e-5)


@every_way
def test_images_of_a_rollout_are_those_of_sampling(way):
    """In batches, each for its own seed."""
    model, sampling = model_of(way), SAMPLINGS["guided"]
    whole = generate_codes(model, ROWS, NEGATIVES, GRID, sampling, generators(4, 5, 6))
    assert torch.equal(rolled_out(model, sampling).codes, whole)


def test_log_probabilities_of_one_code_by_hand():
    """The first code in raster order, from the logits of a plain forward pass."""
    model, sampling = model_of(None), SAMPLINGS["guided"]
    rollout = rolled_out(model, sampling)
    sides = []
    for row in (ROWS[2], NEGATIVES[2]):
        with torch.no_grad():
            hidden = model.backbone.base_model(torch.tensor([row.ids])).last_hidden_state[0, -1]
            sides.append(hidden @ model.image_head.weight.T)
    logits = (sides[1] + 2.5 * (sides[0] - sides[1])) / 1.3
    expected = logits.softmax(0)[rollout.codes[2, 0, 0]].log()
    torch.testing.assert_close(rollout.log_probs[2, 0, 0], expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_filters_count_in_the_log_probabilities_of_sampling():
    """With the single likeliest code kept, every code was certain."""
    _, log_probs = generate_scored(model_of(None), ROWS, None, GRID, Sampling(top_k=1), generators(1, 2, 3))
    assert torch.equal(log_probs, torch.zeros(3, *GRID))
    # Half of the mass kept: the first code is as likely as before, divided by the mass that is left.
    model, kept, plain = model_of(None), Sampling(top_p=0.5), Sampling()
    first = [generate_scored(model, ROWS[:1], None, GRID, each, generators(1)) for each in (kept, plain)]
    assert torch.equal(first[0][0][0, 0, 0], first[1][0][0, 0, 0])  # the same noise, and it is one of those kept
    hidden = model.backbone.base_model(torch.tensor([ROWS[0].ids])).last_hidden_state[0, -1]
    ordered = (hidden @ model.image_head.weight.T).softmax(0).sort(descending=True).values
    left = ordered[: 1 + int((ordered.cumsum(0) < 0.5).sum())].sum()
    torch.testing.assert_close(first[0][1][0, 0, 0], first[1][1][0, 0, 0] - left.log(), rtol=0, atol=1e-5)


def test_gradients_pass_through_both_sides():
    """Guided log-probabilities move against the unconditional side."""
    model = model_of(None)
    arranged = Arranged(rolled_out(model, SAMPLINGS["guided"]), model.config, model.device)
    arranged.log_probs(model).sum().backward()
    step = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    with torch.no_grad():
        before, size = arranged.log_probs(model).sum(), 1e-4
        slope = sum((gradient**2).sum() for gradient in step.values())
        for name, parameter in model.named_parameters():
            if name in step:
                parameter += size * step[name] / slope.sqrt()
        after = arranged.log_probs(model).sum()
    torch.testing.assert_close((after - before) / size, slope.sqrt(), rtol=0.02, atol=0)


def test_an_adapter_samples_and_learns_as_it_is_set():
    model = model_of(None)
    with torch.no_grad():
        model.image_head.weight *= 0.03
    policy = attach_lora(model, rank=2)
    reference = rolled_out(policy, Sampling())
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.normal_(0, 0.3)
    rollout = rolled_out(policy, Sampling())
    trained = Arranged(rollout, policy.get_base_model().config, policy.device).log_probs(policy)
    torch.testing.assert_close(trained.view_as(rollout.log_probs), rollout.log_probs, rtol=0, atol=1e-5)
    assert not torch.equal(rollout.codes, reference.codes)


@pytest.mark.parametrize(
    ("sampling", "message"), [(Sampling(top_k=5), "top_k: 5"), (Sampling(top_p=0.9), "top_p: 0.9")]
)
def test_filters_are_refused(sampling, message):
    with pytest.raises(ValueError, match=message):
        check_rollout(model_of(None).config, sampling)


def test_models_of_classes_are_refused():
    model = tiny_model(conditioning={"kind": "class", "classes": 3})
    with pytest.raises(ValueError, match="pipeline: a model of classes"):
        check_rollout(model.config, Sampling())

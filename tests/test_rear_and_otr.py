"""reAR and one-token rollout, against references that are computed position by position."""

import pytest
import torch
import torch.nn.functional as F
from conftest import full_forward, tiny_model
from test_cca import adapter_run
from test_next_x import image, sequence_of
from test_objectives import rows_of

from unified.data.batches import make_batch
from unified.prediction.merge import patches
from unified.sequence import ImageSegment, TextSegment
from unified.training.config import load_config
from unified.training.loop import train
from unified.training.objectives.base import MicroBatch
from unified.training.objectives.one_token_rollout import OneTokenRollout
from unified.training.objectives.rear import ReAR
from unified.training.tracking import read_log
from unified_tokenizers import ImageTokenizer


class Vectors:
    """As much of an image tokenizer as reAR needs."""

    def codebook_vectors(self):
        return torch.randn(20, 4, generator=torch.Generator().manual_seed(7))


def given_of(objective, model, rows, merge=None, pack=None):
    batch = make_batch(rows, model.config, merge, pack)
    return MicroBatch(model, batch, batch.inputs, model(**batch.inputs, **objective.asks))


def rear_for(model, **options):
    torch.manual_seed(3)
    objective = ReAR(width=16, **options)
    objective.module = objective.build(model, Vectors())
    return objective


@pytest.mark.parametrize("p", [1, 2])
def test_rear_is_the_mean_over_positions(p):
    """Two rows of unlike length, one code of the input exchanged by noise: targets are the true codes."""
    model, vectors = tiny_model(), Vectors().codebook_vectors()
    objective = rear_for(model, current_layer=1, next_layer=2)
    rows = rows_of(model, 2)
    true = [row.input_ids[row.input_ids >= 50] - 50 for row in rows]
    rows[0].input_ids[4] = 50 + (rows[0].input_ids[4] - 49) % 20
    given = given_of(objective, model, rows, patches(p))
    cells = 16 // p**2
    assert objective.count(given.batch) == 2 * cells
    term = objective.loss(given, 2.0 * cells)
    hidden, losses = given.output.hidden_states, []
    for row, (sequence, codes) in enumerate(zip(rows, true, strict=True)):
        start = int((sequence.input_ids >= 50).nonzero()[0])
        grid = vectors[codes].view(4 // p, p, 4 // p, p, 4).mean(dim=(1, 3)).view(cells, 4)
        for cell in range(cells):
            own, before = hidden[1][row, start + cell], hidden[2][row, start + cell - 1]
            losses.append(1 - F.cosine_similarity(objective.module.current(own), grid[cell], dim=0))
            losses.append(1 - F.cosine_similarity(objective.module.next(before), grid[cell], dim=0))
    naive = torch.stack(losses).sum() / (2 * cells)
    torch.testing.assert_close(term.loss, naive)
    weights = [*model.parameters(), *objective.module.parameters()]
    ours = torch.autograd.grad(term.loss, weights, retain_graph=True, allow_unused=True)
    theirs = torch.autograd.grad(naive, weights, allow_unused=True)
    for one, other in zip(ours, theirs, strict=True):
        if other is not None:
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-7)
    assert all(
        one is None or not one.any()
        for weight, one in zip(weights, ours, strict=True)
        if weight is model.image_head.weight
    )


@pytest.mark.parametrize("way", [{"order": "diagonals"}, {"order": "random"}, {"merge": "channel"}], ids=str)
def test_rear_in_every_order(way):
    """Packing changes nothing; and where position i holds code i of the order, its own code can be read and the next cannot."""
    model = tiny_model(prediction=way, image_grids=[[4, 8]])
    objective = rear_for(model)
    rows = rows_of(model, grid=(4, 8))
    losses = [objective.loss(given_of(objective, model, rows, None, pack), 1.0) for pack in (None, 200)]
    torch.testing.assert_close(losses[0].loss, losses[1].loss, rtol=1e-4, atol=1e-4)
    changed = rows_of(model, grid=(4, 8))
    place = int((changed[0].input_ids >= 50).nonzero()[-1])  # the last in raster order
    changed[0].labels[place] = 50 + (changed[0].labels[place] - 49) % 20
    other = objective.loss(given_of(objective, model, changed), 1.0)
    assert (
        other.metrics["current"] != losses[0].metrics["current"] and other.metrics["next"] != losses[0].metrics["next"]
    )


@pytest.mark.process
def test_rear_trains_beside_likelihood_and_resumes(pipeline, config_file, tmp_path):
    """Its networks learn, are in the checkpoint, and not in what is saved; a resumed run logs the same."""
    overrides = ["objectives=[{name: likelihood}, {name: rear, weight: 0.5, width: 32}]", "data.code_noise=0.3"]
    base = ["steps=6", "checkpoint_every=3", "validate_every=null", "optimizer.ema_decay=null"]
    run = [f"output_dir={tmp_path}/run", *overrides, *base]
    folder = train(load_config(config_file, run))
    log = [line for line in read_log(tmp_path / "run") if "rear_loss" in line]
    assert log[-1]["rear_loss"] < log[0]["rear_loss"] and log[0]["image_loss"] > 0
    assert log[0]["rear_loss"] == pytest.approx(log[0]["rear_current"] + log[0]["rear_next"], rel=1e-5)
    checkpoints = sorted((tmp_path / "run" / "checkpoints").iterdir())
    assert (checkpoints[0] / "model_1.safetensors").is_file() and not list(folder.rglob("model_1*"))
    train(load_config(config_file, [*run, f"resume={checkpoints[0]}"]))
    again = [line for line in read_log(tmp_path / "run") if "rear_loss" in line]
    assert [line["rear_loss"] for line in again] == [line["rear_loss"] for line in log]


def test_rear_needs_vectors_and_layers():
    class Without(Vectors):
        codebook_vectors = ImageTokenizer.codebook_vectors

    with pytest.raises(ValueError, match="objectives: rear needs code vectors, and Without has none"):
        ReAR().build(tiny_model(), Without())
    with pytest.raises(ValueError, match=r"objectives\.rear\.next_layer: 3 is beyond the 2 layers"):
        ReAR(next_layer=3).build(tiny_model(), Vectors())


def test_one_token_rollout_is_the_expected_policy_gradient():
    """Enumerated over all codes that could be sampled: sum_a p(a) r(a) grad log p(a), for two rewards of a wrong code."""
    model = tiny_model()
    row = sequence_of(model, TextSegment([5, 6]), ImageSegment(image(1, (2, 3))))
    objective = OneTokenRollout()
    given = given_of(objective, model, [row])
    objective.loss(given, objective.count(given.batch)).loss.backward()
    found = {
        name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0
    }
    logits = full_forward(model, row.input_ids, row.image_grids).image_logits[0]
    places = [i for i, token in enumerate(row.input_ids.tolist()) if token >= 50]
    for wrong in (-0.5, 0.25):
        losses = []
        for place in places:
            log_probs = logits[place - 1].log_softmax(0)
            rewards = torch.full((20,), wrong)
            rewards[row.input_ids[place] - 50] = 1.0
            losses.append(-(log_probs.detach().exp() * rewards * log_probs).sum())
        model.zero_grad()
        (torch.stack(losses).mean() / (1 - wrong)).backward(retain_graph=True)
        for name, gradient in found.items():
            torch.testing.assert_close(model.get_parameter(name).grad, gradient, rtol=1e-3, atol=1e-6)


@pytest.mark.process
def test_one_token_rollout_trains_an_adapter(pipeline, config_file, tmp_path):
    train(
        adapter_run(
            pipeline, config_file, tmp_path, "steps=6", "optimizer.learning_rate=0.05", "objectives=[{name: otr}]"
        )
    )
    log = [line for line in read_log(tmp_path / "run") if "otr_loss" in line]
    assert log[-1]["otr_probability"] > log[0]["otr_probability"]

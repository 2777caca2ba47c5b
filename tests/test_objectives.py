"""The room of objectives: settings, the step that sums them, log-probabilities of images under policy and reference."""

import copy
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from accelerate import Accelerator
from conftest import full_forward, tiny_model
from test_next_x import every_way, image, model_of, sequence_of

from unified.data.batches import make_batch
from unified.lora.adapters import attach_lora
from unified.prediction.merge import patches
from unified.sequence import IGNORE, ImageSegment, TextSegment
from unified.training.config import load_config
from unified.training.objectives.base import Objective, Term
from unified.training.objectives.likelihood import Likelihood
from unified.training.objectives.log_probs import log_probs_of, per_image, per_sequence, reference_log_probs
from unified.training.step import train_step
from unified.training.tracking import LossMeter


def rows_of(model, count=3, grid=(4, 4)):
    """Captions of different lengths, each with an image."""
    return [
        sequence_of(model, TextSegment(list(range(5, 6 + i))), ImageSegment(image(i, grid)), seed=i)
        for i in range(count)
    ]


def adapted(model, seed=1):
    """The model with an adapter of random weights."""
    policy = attach_lora(model, rank=4, train_image_tables=True)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return policy


def test_log_probs_are_those_of_a_plain_forward():
    """Enumerated: every code of two images in one row, from the logits of a pass without labels."""
    model = tiny_model()
    codes = [image(1, (4, 4)), image(2, (2, 3))]
    row = sequence_of(model, TextSegment([5, 6]), ImageSegment(codes[0]), TextSegment([7]), ImageSegment(codes[1]))
    batch = make_batch([row], model.config)
    values = log_probs_of(model, batch.inputs)
    logits = full_forward(model, row.input_ids, row.image_grids).image_logits[0]
    wanted = [
        logits[place - 1].log_softmax(0)[row.input_ids[place] - 50]
        for place in range(len(row.input_ids))
        if row.input_ids[place] >= 50
    ]
    torch.testing.assert_close(values[:, 0], torch.stack(wanted))
    sums = [torch.stack(wanted[:16]).sum(), torch.stack(wanted[16:]).sum()]
    torch.testing.assert_close(per_image(values, batch.inputs, 2), torch.stack(sums))
    weights = torch.linspace(-1, 1, len(wanted))
    (values[:, 0] * weights).sum().backward()
    found = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    (torch.stack(wanted) * weights).sum().backward()
    for one, other in zip(found, (p.grad for p in model.parameters() if p.grad is not None), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@every_way
@pytest.mark.parametrize("p", [1, pytest.param(2, marks=pytest.mark.process)])
def test_images_of_every_order_get_their_own_log_probs(way, p):
    """Each image alone has the same: its loss times its codes. Also in patches, in packed rows, beside images without loss."""
    model = model_of(way)
    rows = rows_of(model, grid=(4, 8))
    unsupervised = sequence_of(model, ImageSegment(image(9), loss=False), TextSegment([8]), seed=9)
    rows.insert(1, unsupervised)
    merge = None if p == 1 else patches(p)
    batch = make_batch(rows, model.config, merge, 200)
    values = log_probs_of(model, batch.inputs)
    sums = per_sequence(values, batch, batch.inputs)
    assert sums[1] == 0
    for number in (0, 2, 3):
        alone = model(**make_batch([rows[number]], model.config, merge).inputs).image_loss
        torch.testing.assert_close(sums[number], -32 * alone, rtol=1e-5, atol=1e-4)
    joint = model(**batch.inputs, return_log_probs=True)
    torch.testing.assert_close(joint.image_loss, model(**batch.inputs).image_loss)
    grads = [
        torch.autograd.grad(model(**batch.inputs, return_log_probs=on).loss, model.image_head.weight)[0]
        for on in (True, False)
    ]
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("way", [None, {"order": "random"}], ids=str)
def test_the_reference_is_the_model_before_its_adapter(way):
    """Bit for bit, in training with dropout too; what is trained stays so, and the policy differs."""
    model = tiny_model(prediction=way, dropout=0.3)
    batch = make_batch(rows_of(model), model.config)
    with torch.no_grad():
        before = log_probs_of(model, batch.inputs)
    policy = adapted(model).train()
    trainable = [p.requires_grad for p in policy.parameters()]
    reference = reference_log_probs(policy, batch.inputs)
    assert torch.equal(reference, before) and not reference.requires_grad
    assert policy.training and [p.requires_grad for p in policy.parameters()] == trainable
    assert (log_probs_of(policy.eval(), batch.inputs) - reference).abs().max() > 0.01
    log_probs_of(policy, batch.inputs).sum().backward()
    assert all((p.grad is not None) == p.requires_grad for name, p in policy.named_parameters() if "lora_" in name)
    with pytest.raises(ValueError, match="the model has no adapter"):
        reference_log_probs(tiny_model(), batch.inputs)


def accelerator_of(model, optimizer, steps):
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=steps)
    return accelerator, *accelerator.prepare(model, optimizer)


def test_likelihood_alone_is_the_step_without_objectives(config_file, tmp_path):
    """Bit for bit the gradient of the model's own loss, over two micro-batches."""
    config = load_config(config_file, [f"output_dir={tmp_path}"])
    assert [vars(each) for each in config.build_objectives()] == [{"weight": 1.0}]
    model = tiny_model()
    rows = rows_of(model, 4)
    batches = [make_batch(rows[:3], model.config), make_batch(rows[3:], model.config)]
    naive = copy.deepcopy(model)
    optimizer = torch.optim.SGD(naive.parameters(), lr=0.5)
    items = sum(batch.counts.weight for batch in batches) / 2
    for batch in batches:
        (naive(**batch.inputs, num_items_in_batch=items).loss / 2).backward()
    torch.nn.utils.clip_grad_norm_(naive.parameters(), config.optimizer.gradient_clip)
    optimizer.step()
    accelerator, trained, optimizer = accelerator_of(model, torch.optim.SGD(model.parameters(), lr=0.5), 2)
    train_step(
        accelerator, trained, [optimizer], batches, 0.5, config, LossMeter(accelerator), config.build_objectives()
    )
    for one, other in zip(model.parameters(), naive.parameters(), strict=True):
        assert torch.equal(one, other)


@dataclass
class Squares(Objective):
    """Squares of the log-probabilities of images, for a test."""

    name: ClassVar[str] = "squares"
    asks: ClassVar[dict | None] = {"return_log_probs": True}

    def count(self, batch):
        return batch.counts.images

    def loss(self, given, items):
        sums = per_image(given.output.log_probs, given.inputs, given.batch.counts.images)
        return Term((sums**2).sum() / items, {"sum": sums.sum()})


def test_objectives_are_summed_by_weight_and_over_micro_batches(config_file, tmp_path):
    """Two micro-batches of unequal size are one batch; likelihood and another loss add up, each over what it counts."""
    config = load_config(config_file, [f"output_dir={tmp_path}", "optimizer.gradient_clip=.inf"])
    rows = rows_of(tiny_model(), 4)
    grads = []
    for parts in ([rows], [rows[:3], rows[3:]]):
        model = tiny_model()
        batches = [make_batch(part, model.config) for part in parts]
        accelerator, trained, optimizer = accelerator_of(model, torch.optim.SGD(model.parameters(), lr=1.0), len(parts))
        meter = LossMeter(accelerator)
        before = copy.deepcopy(model.state_dict())
        objectives = [Likelihood(0.5), Squares(0.001)]
        train_step(accelerator, trained, [optimizer], batches, 1.0, config, meter, objectives)
        grads.append({name: before[name] - value for name, value in model.state_dict().items()})
        means = meter.means()
    naive = tiny_model()
    whole = make_batch(rows, naive.config)
    sums = -16 * torch.stack([naive(**make_batch([row], naive.config).inputs).image_loss for row in rows])
    (0.5 * naive(**whole.inputs).loss + 0.001 * (sums**2).mean()).backward()
    for name, parameter in naive.named_parameters():
        for found in grads:
            torch.testing.assert_close(found[name], parameter.grad, rtol=1e-3, atol=1e-5)
    assert means["squares_loss"] == pytest.approx((sums**2).mean().item(), rel=1e-5)
    assert means["squares_sum"] == pytest.approx(sums.mean().item(), rel=1e-5)
    assert {"image_loss", "text_loss"} < means.keys()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("[]", "objectives: empty; list one or more of likelihood"),
        ("[{weight: 1.0}]", "objectives: .* is no entry such as"),
        ("[likelihood]", "is no entry such as|does not fit"),
        ("[{name: likelyhood}]", "objectives: 'likelyhood' is unknown; did you mean 'likelihood'"),
        ("[{name: likelihood, wait: 2}]", "objectives.likelihood.wait: unknown; did you mean 'weight'"),
        ("[{name: likelihood, weight: heavy}]", "objectives.likelihood.weight: .*heavy"),
        ("[{name: likelihood, weight: 0}]", "objectives.likelihood.weight: 0.0 must be above 0"),
        ("[{name: likelihood}, {name: likelihood}]", "objectives: 'likelihood' is listed 2 times"),
    ],
)
def test_settings_that_do_not_fit(config_file, tmp_path, given, message):
    with pytest.raises(ValueError, match=message):
        load_config(config_file, [f"output_dir={tmp_path}", f"objectives={given}"])


def test_owners_follow_the_packing():
    """The shortest row comes last in a packed batch; its image keeps its number."""
    model = tiny_model()
    rows = [
        sequence_of(model, TextSegment([5])),
        sequence_of(model, TextSegment([5]), ImageSegment(image(1, (2, 2)))),
        sequence_of(model, TextSegment([5]), ImageSegment(image(2)), TextSegment([6]), ImageSegment(image(3, (2, 2)))),
    ]
    batch = make_batch(rows, model.config, pack_length=43)
    first = [codes for codes in batch.inputs["labels"].flatten().tolist() if codes != IGNORE and codes >= 50]
    assert first[: len(first) - 4] == (image(2).flatten() + 50).tolist() + (image(3, (2, 2)).flatten() + 50).tolist()
    assert batch.owners.tolist() == [2, 2, 1]

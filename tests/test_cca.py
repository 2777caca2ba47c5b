"""Condition Contrastive Alignment: pairs, loss against an enumerated reference, and adapters that need no guidance."""

import copy
from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import full_forward, tiny_model
from test_next_x import image, sequence_of
from test_objectives import adapted, rows_of

from unified import UnifiedPipeline
from unified.data.batches import make_batch
from unified.lora.base import base_of
from unified.prediction.merge import patches
from unified.sequence import IGNORE, ImageSegment, TextSegment, TokenSequence
from unified.training.config import load_config
from unified.training.loop import train
from unified.training.objectives.base import MicroBatch
from unified.training.objectives.cca import CCA, mismatched
from unified.training.tracking import read_log


def micro_batch(objective, model, sequences, merge=None, pack=None, seed=0):
    config = base_of(model).config
    further = objective.further(sequences, np.random.default_rng(seed), config)
    batch = make_batch(sequences, config, merge, pack)
    batch = batch._replace(further={objective.name: make_batch(further, config, merge, pack)})
    output = model(**batch.inputs, num_items_in_batch=1.0, **objective.asks)
    return MicroBatch(model, batch, batch.inputs, output), further


def naive_log_prob(model, sequence):
    """Of the codes of the only image, from the logits of a plain pass over this row alone."""
    ids = sequence.input_ids
    logits = full_forward(base_of(model), ids, sequence.image_grids).image_logits[0]
    return sum(logits[i - 1].log_softmax(0)[ids[i] - 50] for i in range(len(ids)) if ids[i] >= 50)


def test_the_loss_is_that_of_the_paper():
    """Enumerated row by row, with a copy of the model from before as reference; gradients reach the adapter alone."""
    model = tiny_model()
    reference, policy = copy.deepcopy(model), adapted(model)
    sequences = rows_of(policy.get_base_model())
    objective = CCA(beta=0.3, negative_weight=2.5)
    given, further = micro_batch(objective, policy, sequences)
    count = objective.count(given.batch)
    term = objective.loss(given, count)
    term.loss.backward()
    found = {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}
    assert found and all("lora_" in name or "modules_to_save" in name for name in found)
    policy.zero_grad()
    losses, right = [], 0
    for own, other in zip(sequences, further, strict=True):
        assert torch.equal(own.input_ids[own.input_ids >= 50], other.input_ids[other.input_ids >= 50])
        ratios = [naive_log_prob(policy, row) - naive_log_prob(reference, row).detach() for row in (own, other)]
        losses.append(-F.logsigmoid(0.3 * ratios[0]) - 2.5 * F.logsigmoid(-0.3 * ratios[1]))
        right += float(ratios[0] > ratios[1])
    naive = torch.stack(losses).mean() / 2.5
    assert count == 3 and term.metrics["accuracy"] == right
    torch.testing.assert_close(term.loss, naive, rtol=1e-4, atol=1e-5)
    naive.backward()
    for name, parameter in policy.named_parameters():
        if name in found:
            torch.testing.assert_close(found[name], parameter.grad, rtol=1e-3, atol=1e-5)


@pytest.mark.process
@pytest.mark.parametrize("way", [None, {"order": "diagonals"}, {"order": "random"}, {"merge": "channel"}], ids=str)
def test_packing_patches_and_orders_change_no_loss_of_a_pair(way):
    """A batch of all is the mean of what each pair gives alone, in packed rows too, in a coarse stage too."""
    policy = adapted(tiny_model(prediction=way, image_grids=[[4, 8]]))
    sequences = rows_of(policy.get_base_model(), grid=(4, 8))
    objective = CCA(beta=0.1, negative_weight=3.0)
    for merge in (None, patches(2)):
        with torch.no_grad():
            given, further = micro_batch(objective, policy, sequences, merge)
            whole = objective.loss(given, 3.0).loss
            packed, _ = micro_batch(objective, policy, sequences, merge, pack=180)
            assert packed.batch.inputs["input_ids"].shape[0] < 3
            torch.testing.assert_close(objective.loss(packed, 3.0).loss, whole, rtol=1e-4, atol=1e-5)
            alone = []
            for own, other in zip(sequences, further, strict=True):
                batch = make_batch([own], base_of(policy).config, merge)
                negative = make_batch([other], base_of(policy).config, merge)
                output = policy(**batch.inputs, return_log_probs=True)
                batch = batch._replace(further={"cca": negative})
                alone.append(objective.loss(MicroBatch(policy, batch, batch.inputs, output), 3.0).loss)
        torch.testing.assert_close(sum(alone), whole, rtol=1e-4, atol=1e-5)


def test_no_image_meets_its_own_or_an_equal_condition():
    rng = np.random.default_rng(0)
    for _ in range(200):
        names = rng.choice(["a", "b", "c", "d", None], size=rng.integers(1, 12)).tolist()
        partners = mismatched(names, rng)
        taken = [partner for partner in partners if partner is not None]
        assert len(set(taken)) == len(taken)
        assert all(
            names[i] is not None and names[j] not in (None, names[i]) for i, j in enumerate(partners) if j is not None
        )
        counts = Counter(name for name in names if name is not None)
        if counts and 2 * max(counts.values()) <= counts.total():
            assert sum(partner is not None for partner in partners) == counts.total()
    seen = {tuple(mismatched(["a", "b", "c"], np.random.default_rng(seed))) for seed in range(20)}
    assert seen == {(1, 2, 0), (2, 0, 1)}


def test_rows_without_a_pair_add_nothing():
    """Equal captions, a dropped one, an image before its caption, two images, text alone: they go through and count nothing."""
    policy = adapted(tiny_model())
    model = policy.get_base_model()
    pair = [sequence_of(model, TextSegment([5 + i]), ImageSegment(image(i))) for i in range(2)]
    others = [
        sequence_of(model, TextSegment([]), ImageSegment(image(2))),
        sequence_of(model, ImageSegment(image(3), loss=False), TextSegment([7])),
        sequence_of(model, TextSegment([8]), ImageSegment(image(4)), ImageSegment(image(5))),
        sequence_of(model, TextSegment([9, 9])),
    ]
    objective = CCA(beta=0.3, negative_weight=2.0)
    given, further = micro_batch(objective, policy, [*pair, *others])
    assert objective.count(given.batch) == 2
    assert all((row.labels == IGNORE).all() for row in further[2:]) and further[0].input_ids[1] == 6
    alone, _ = micro_batch(objective, policy, pair)
    torch.testing.assert_close(objective.loss(given, 2.0).loss, objective.loss(alone, 2.0).loss, rtol=1e-4, atol=1e-5)
    equal, _ = micro_batch(objective, policy, [pair[0], pair[0], others[3]])
    assert objective.count(equal.batch) == 0 and objective.loss(equal, 1.0).loss == 0


def test_classes_are_conditions():
    policy = adapted(tiny_model(conditioning={"kind": "class", "classes": 3}))
    ids = [torch.cat([torch.tensor([3]), image(i, (4, 4)).flatten() + 50]) for i in range(4)]
    sequences = [
        TokenSequence(row, row.clone(), [(4, 4)], condition=c) for row, c in zip(ids, (0, 2, 3, 1), strict=True)
    ]
    for sequence in sequences:
        sequence.labels[0] = IGNORE
    objective = CCA()
    given, further = micro_batch(objective, policy, sequences)
    assert objective.count(given.batch) == 3 and further[2].condition == 3 and (further[2].labels == IGNORE).all()
    assert sorted(further[i].condition for i in (0, 1, 3)) == [0, 1, 2]
    assert all(further[i].condition != sequences[i].condition for i in (0, 1, 3))
    assert objective.loss(given, 3.0).loss > 0


def adapter_run(pipeline, config_file, folder, *overrides):
    pipeline.save_pretrained(folder / "base")
    return load_config(config_file, [
        f"output_dir={folder}/run", f"model.pipeline={folder}/base", "model.architecture=null", "model.image_tokenizer=null",
        "model.text_tokenizer=null", "lora.rank=4", "optimizer.ema_decay=null", "schedule={patch_sizes: [1], shares: [1.0]}",
        "validate_every=null", "checkpoint_every=null", *overrides,
    ])  # fmt: skip


@pytest.mark.process
def test_an_adapter_of_it_samples_without_guidance(pipeline, config_file, tmp_path):
    """What it trains grows apart; loaded, guidance is off unless a call, or the pipeline's owner, says otherwise."""
    config = adapter_run(
        pipeline, config_file, tmp_path, "steps=12", "optimizer.learning_rate=0.02", "data.caption_dropout=0",
        "objectives=[{name: cca, beta: 0.1, negative_weight: 1}]", "gradient_accumulation_steps=2",
    )  # fmt: skip
    folder = train(config)
    log = [line for line in read_log(tmp_path / "run") if "cca_loss" in line]
    assert log[0]["cca_loss"] == pytest.approx(2 * np.log(2), rel=1e-3) and log[0]["cca_margin"] == pytest.approx(
        0, abs=1e-3
    )
    assert log[-1]["cca_loss"] < log[0]["cca_loss"] - 0.05 and log[-1]["cca_margin"] > 1
    pipe = UnifiedPipeline.from_pretrained(tmp_path / "base")
    pipe.set_progress_bar_config(disable=True)

    def codes(**options):
        return pipe("red apple", generator=torch.Generator().manual_seed(1), output_type="codes", **options).codes

    pipe.load_lora_weights(folder)
    assert dict(pipe.sampling) == {"guidance_scale": 1.0}
    assert torch.equal(codes(), codes(guidance_scale=1.0)) and not torch.equal(codes(), codes(guidance_scale=3.0))
    pipe.disable_lora()
    assert dict(pipe.sampling) == {}
    pipe.enable_lora()
    pipe.save_lora_weights(tmp_path / "copy")
    other = UnifiedPipeline.from_pretrained(tmp_path / "base")
    other.load_lora_weights(tmp_path / "copy")
    assert dict(other.sampling) == {"guidance_scale": 1.0}
    other.fuse_lora()
    other.save_pretrained(tmp_path / "fused")
    assert dict(UnifiedPipeline.from_pretrained(tmp_path / "fused").sampling) == {"guidance_scale": 1.0}
    pipe.sampling = {"guidance_scale": 2.0}
    assert dict(pipe.sampling) == {"guidance_scale": 2.0}
    pipe.unload_lora_weights()
    (folder / "unified_base.json").write_text(
        (folder / "unified_base.json").read_text().replace('"guidance_scale": 1.0', '"x": 1')
    )
    with pytest.raises(ValueError, match=r"lora: .*unified_base.json'?: sampling: 'x' is no default"):
        pipe.load_lora_weights(folder)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["objectives=[{name: cca}]"], "objectives: cca compares the model with itself without its adapter; set lora"),
        (["objectives=[{name: cca, beta: 0}]", "lora.rank=4"], "objectives.cca.beta: 0.0 must be above 0"),
        (["objectives=[{name: cca}]", "lora.rank=4", "batch_size=1"], "batch_size: 1 leaves objectives.cca no other"),
    ],
)
def test_settings_that_do_not_fit(config_file, tmp_path, overrides, message):
    with pytest.raises(ValueError, match=message):
        load_config(config_file, [f"output_dir={tmp_path}", *overrides])

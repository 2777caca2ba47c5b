"""GRPO: its numbers against loops of plain Python, a policy that gains, and runs that end early and go on."""

import json
import math
import os
import signal
import sys
import types

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from conftest import CAPTIONS, tiny_pipeline
from safetensors.torch import load_file

import grpo as recipe
from unified.lora.adapters import attach_lora
from unified.lora.base import base_of
from unified.lora.switching import adapters_off
from unified.training.model_config import LoraSettings
from unified.training.objectives.grpo import (
    SPREAD,
    check_policy,
    code_diversity,
    group_advantages,
    grpo_loss,
    k3,
)
from unified.training.rewards import RewardSettings
from unified.training.rollouts import Arranged


def naive_advantages(rewards, size):
    result = []
    for start in range(0, len(rewards), size):
        group = rewards[start : start + size]
        mean = sum(group) / size
        deviation = math.sqrt(sum((value - mean) ** 2 for value in group) / (size - 1))
        result += [(value - mean) / (deviation + SPREAD) for value in group]
    return result


def naive_loss(log_probs, sampled, reference, advantages, clip, kl_weight):
    """Loss, KL, ratio and share of the codes that give no gradient to the policy's gain, code by code."""
    losses, kls, ratios, clipped = [], [], [], []
    for image, gain in enumerate(advantages):
        for now, then, base in zip(log_probs[image], sampled[image], reference[image], strict=True):
            ratio = math.exp(now) / math.exp(then)
            counted = ratio
            if gain > 0 and ratio > 1 + clip:
                counted = 1 + clip
            if gain < 0 and ratio < 1 - clip:
                counted = 1 - clip
            other = math.exp(base) / math.exp(now)
            kls.append(other - 1 - math.log(other))
            losses.append(kl_weight * kls[-1] - counted * gain)
            ratios.append(ratio)
            clipped.append(counted != ratio)
    return [sum(each) / len(each) for each in (losses, kls, ratios, clipped)]


def test_advantages_are_those_of_a_loop():
    rewards = [0.0, 1.0, 1.0, 4.0, 2.0, 2.0, 2.0, 2.0, -1.0, 0.5, 0.25, 7.0]
    ours = group_advantages(torch.tensor(rewards), 4)
    assert ours.tolist() == pytest.approx(naive_advantages(rewards, 4), abs=1e-5)
    assert ours[4:8].tolist() == [0.0] * 4  # nothing to learn where all are alike
    for size in (1, 5):
        with pytest.raises(ValueError, match=f"group_size: {size} for 12 rewards"):
            group_advantages(torch.tensor(rewards), size)


def test_loss_is_that_of_a_loop():
    rng = torch.Generator().manual_seed(0)
    sampled, shift, away = (torch.randn(6, 5, generator=rng) for _ in range(3))
    sampled, log_probs = -sampled.abs() - 0.5, -sampled.abs() - 0.5 + 0.3 * shift
    reference, advantages = log_probs + 0.4 * away, torch.tensor([1.5, -2.0, 0.0, 0.3, -0.1, 1.0])
    found = grpo_loss(log_probs, sampled, reference, advantages, 0.2, 0.7)
    expected = naive_loss(log_probs.tolist(), sampled.tolist(), reference.tolist(), advantages.tolist(), 0.2, 0.7)
    assert [float(value) for value in found] == pytest.approx(expected, abs=1e-5)
    assert 0.1 < float(found.clipped) < 0.5


def test_clipped_codes_give_no_gradient_and_pull_back_they_do():
    """Ratios beyond the bound count where they would lose, not where they would gain."""
    log_probs = torch.tensor([[0.5, -0.5, 0.0], [0.5, -0.5, 0.0]], requires_grad=True)
    grpo_loss(log_probs, torch.zeros(2, 3), log_probs.detach(), torch.tensor([1.0, -1.0]), 0.2, 0.0).loss.backward()
    ratios = torch.tensor([math.exp(0.5), math.exp(-0.5), 1.0])
    expected = torch.stack([-ratios * torch.tensor([0.0, 1.0, 1.0]), ratios * torch.tensor([1.0, 0.0, 1.0])]) / 6
    torch.testing.assert_close(log_probs.grad, expected)


def test_k3_is_the_divergence_on_average():
    """Summed over all codes by their probability it is KL(policy, reference), and nowhere negative."""
    policy, reference = torch.randn(2, 9, generator=torch.Generator().manual_seed(1), dtype=torch.double).log_softmax(1)
    values = k3(policy, reference)
    assert float((policy.exp() * values).sum()) == pytest.approx(
        float((policy.exp() * (policy - reference)).sum()), rel=1e-9
    )
    assert float(values.min()) >= 0 and float(k3(policy, policy).abs().max()) == 0


def test_diversity_is_the_share_of_cells_that_differ():
    one, other = torch.zeros(2, 2, dtype=torch.int64), torch.tensor([[0, 1], [0, 1]])
    assert code_diversity(torch.stack([one, one, other, other]), 2) == 0
    assert code_diversity(torch.stack([one, other, one, one]), 2) == pytest.approx((1 / 2 + 0) / 2)
    assert code_diversity(torch.stack([one, one, other]), 3) == pytest.approx((0 + 1 / 2 + 1 / 2) / 3)


# A policy


def settings_of(output, pipeline="unused", prompts="unused", **changes):
    given = {
        "lora": LoraSettings(rank=4), "steps": 4, "prompts_per_step": 2, "group_size": 8, "learning_rate": 0.02,
        "rewards": [RewardSettings("own_rewards:dark")], "kl_weight": 0.0, **changes,
    }  # fmt: skip
    return recipe.GrpoSettings(output_dir=str(output), pipeline=str(pipeline), prompts=str(prompts), **given)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, text_tokenizer, image_tokenizer):
    path = tmp_path_factory.mktemp("grpo") / "pipeline"
    tiny_pipeline(text_tokenizer, image_tokenizer).save_pretrained(path)
    return path


@pytest.mark.process
@pytest.mark.parametrize(
    "changes",
    [pytest.param({}, id="plain"),
     pytest.param({"guidance_scale": 2.0, "temperature": 0.8, "updates": 2, "batch_size": 6}, id="guided")],
)  # fmt: skip
def test_an_exact_reward_rises(folder, changes):
    """The share of code 3, which one code in twenty is by chance."""
    settings = settings_of("unused", folder, **changes)
    policy, rewards = recipe.build_policy(settings, Accelerator(cpu=True)), []
    for step in range(12):
        rollout, _ = policy.rollout(step, CAPTIONS[:2])
        share = (rollout.codes == 3).float().mean(dim=(1, 2))
        metrics = policy.update(rollout, group_advantages(share, settings.group_size))
        rewards.append(float(share.mean()))
        if step == 0:
            assert metrics["kl"] == pytest.approx(0, abs=1e-3) or settings.updates > 1
    assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 0.15
    assert metrics["kl"] > 0.01


def test_the_reference_is_the_model_without_its_adapter(folder):
    """The first update starts at ratio 1 and KL 0; a later one is held back by its distance."""
    policy = recipe.build_policy(settings_of("unused", folder), Accelerator(cpu=True))
    base = {name: value.clone() for name, value in policy.model.state_dict().items() if "lora_" not in name}
    rollout, _ = policy.rollout(0, CAPTIONS[:2])
    rewards = torch.randn(16, generator=torch.Generator().manual_seed(0))
    first = policy.update(rollout, group_advantages(rewards, 8))
    assert first["ratio"] == pytest.approx(1, abs=1e-4) and first["kl"] == pytest.approx(0, abs=1e-4)
    rollout, _ = policy.rollout(1, CAPTIONS[:2])
    arranged = Arranged(rollout, base_of(policy.model).config, policy.model.device)
    with torch.no_grad():
        now = arranged.log_probs(policy.model)
        with adapters_off(policy.model):
            reference = arranged.log_probs(policy.model)
    ratio = (reference - now).exp()
    expected = float((ratio - 1 - ratio.log()).mean())
    assert policy.update(rollout, torch.zeros(16))["kl"] == pytest.approx(expected, rel=1e-3) and expected > 1e-3
    after = policy.model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in base.items())


def test_a_policy_without_an_adapter_asks_for_one(pipeline):
    with pytest.raises(ValueError, match="attach_lora"):
        check_policy(pipeline.model)
    adapted = attach_lora(pipeline.model, rank=2)
    check_policy(adapted)
    adapted.requires_grad_(False)
    with pytest.raises(ValueError, match="trainable=True"):
        check_policy(adapted)


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"lora": None}, "lora, adapter: set exactly one"), ({"adapter": "x"}, "lora, adapter: set exactly one"),
     ({"group_size": 1}, "group_size: 1"), ({"clip": 0.0}, "clip: 0.0"),
     ({"decay": 1.5}, "decay: 1.5"), ({"kl_weight": math.nan}, "kl_weight: nan"),
     ({"lora": LoraSettings(dropout=0.1)}, "lora.dropout")],
)  # fmt: skip
def test_settings_that_are_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        settings_of(tmp_path, **changes).check()


# Runs


def dark(images, prompts):
    return [-float(np.asarray(image).mean()) / 255 for image in images]


@pytest.fixture
def at_step(monkeypatch):
    """What happens in the reward of a step, by its number."""
    made, events, calls = types.ModuleType("own_rewards"), {}, []

    def reward(images, prompts):
        calls.append(len(images))
        if len(calls) - 1 in events:
            events.pop(len(calls) - 1)()
        return dark(images, prompts)

    made.dark = reward
    monkeypatch.setitem(sys.modules, "own_rewards", made)
    return events


def fail():
    raise RuntimeError("killed")


@pytest.mark.process
@pytest.mark.parametrize("end", ["signal", "error"])
def test_a_run_that_ended_early_and_went_on_equals_one_that_did_not(tmp_path, folder, picture_source, at_step, end):
    """After a signal there is a checkpoint of that step; after an error the run goes back to the one before."""
    settings = settings_of(tmp_path / "whole", folder, picture_source, checkpoint_every=2, decay=0.5)
    whole = recipe.run(settings)
    at_step[4 + 2] = fail if end == "error" else lambda: os.kill(os.getpid(), signal.SIGTERM)
    settings.output_dir = str(tmp_path / "broken")
    with pytest.raises(SystemExit if end == "signal" else ValueError):
        recipe.run(settings)
    settings.resume = "latest"
    resumed = recipe.run(settings)
    ours, theirs = (load_file(path / "adapter_model.safetensors") for path in (whole, resumed))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    logs = [[json.loads(line) for line in (path.parent / "log.jsonl").open()] for path in (whole, resumed)]
    assert logs[0] == logs[1] and [line["step"] for line in logs[0]] == [1, 2, 3, 4]
    assert [line["lr"] for line in logs[0]] == pytest.approx([0.02, 0.02, 0.02, 0.011])
    assert {"reward", "reward_spread", "kl", "entropy", "diversity", "clipped", "ratio"} <= logs[0][0].keys()


@pytest.mark.process
def test_a_run_goes_on_with_an_adapter(tmp_path, folder, picture_source, at_step):
    """What it samples first is what the adapter samples, and the reference is still the model without."""
    first = recipe.run(settings_of(tmp_path / "first", folder, picture_source, steps=2))
    settings = settings_of(tmp_path / "second", folder, picture_source, lora=None, adapter=str(first), steps=1)
    recipe.run(settings)
    (line,) = (json.loads(line) for line in (tmp_path / "second" / "log.jsonl").open())
    assert line["kl"] > 1e-3 and line["ratio"] == pytest.approx(1, abs=1e-4)

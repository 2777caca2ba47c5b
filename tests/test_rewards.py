"""Rewards by import path: weights, and what is wrong with one is said with the prompt."""

import math
import sys
import types

import numpy as np
import pytest
import torch
from PIL import Image

import prepare_shapes as recipe
from unified.training.rewards import Rewards, RewardSettings, load_reward, rewards_of
from unified_eval import rewards as of_eval

PROMPTS = ["red apple", "blue car", "yellow sun"]


def grey(*levels):
    return [Image.fromarray(np.full((8, 8, 3), level, dtype=np.uint8)) for level in levels]


def brightness(images, prompts, scale=1.0):
    return [scale * float(np.asarray(image).mean()) for image in images]


def length(images, prompts):
    return [len(prompt) for prompt in prompts]


def fails_on_cars(images, prompts):
    if any("car" in prompt for prompt in prompts):
        raise KeyError("car")
    return [0.0] * len(images)


def fails_together(images, prompts):
    if len(images) > 1:
        raise RuntimeError("too many")
    return [0.0]


@pytest.fixture
def module(monkeypatch):
    made = types.ModuleType("own_rewards")
    made.brightness, made.length, made.number = brightness, length, 3
    monkeypatch.setitem(sys.modules, "own_rewards", made)


def test_several_are_added_up_by_weight(module):
    settings = [
        RewardSettings("own_rewards:brightness", 0.5, {"scale": 2.0}),
        RewardSettings("own_rewards:length", -1.0),
    ]
    total, parts = Rewards(settings)(grey(10, 20, 40), PROMPTS)
    assert parts["own_rewards:brightness"].tolist() == [20.0, 40.0, 80.0]
    assert parts["own_rewards:length"].tolist() == [9.0, 8.0, 10.0]
    assert total.tolist() == [1.0, 12.0, 30.0]


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (lambda images, prompts: [1.0, math.nan, 2.0], r"nan for the prompt 'blue car'"),
        (lambda images, prompts: [1.0, 2.0, math.inf], r"inf for the prompt 'yellow sun'"),
        (lambda images, prompts: [1.0, 2.0], r"2 values for 3 images, first prompt 'red apple'"),
        (lambda images, prompts: 1.0, r"returns 1.0, first prompt 'red apple'"),
        (lambda images, prompts: ["good"] * 3, r"first prompt 'red apple'; return a list of numbers"),
        (fails_on_cars, r"for the prompt 'blue car' \(KeyError: 'car'\)"),
        (fails_together, r"for 3 images \(RuntimeError: too many\)"),
    ],
)
def test_a_wrong_reward_is_named_with_the_prompt(reward, message):
    with pytest.raises(ValueError, match=message) as caught:
        rewards_of("own:reward", reward, grey(1, 2, 3), PROMPTS)
    assert "'own:reward'" in str(caught.value)


@pytest.mark.parametrize(
    ("path", "message"),
    [("own_rewards.brightness", "module:function"), ("own_rewards:", "module:function"),
     ("no_such_module_here:f", "cannot be imported"), ("own_rewards:dimness", "no function 'dimness'"),
     ("own_rewards:number", "no function 'number'")],
)  # fmt: skip
def test_paths_that_name_no_function(module, path, message):
    with pytest.raises(ValueError, match=message):
        load_reward(path)


def test_lists_of_rewards_that_are_refused(module):
    with pytest.raises(ValueError, match="the list is empty"):
        Rewards([])
    with pytest.raises(ValueError, match="given twice"):
        Rewards([RewardSettings("own_rewards:length"), RewardSettings("own_rewards:length", 2.0)])
    with pytest.raises(ValueError, match="weight: nan"):
        Rewards([RewardSettings("own_rewards:length", math.nan)])


def test_agreement_of_shapes_is_the_share_of_claims_that_hold():
    circle = recipe.Thing("medium", "red", "circle", 0.5, 0.5, 0.165)
    image = recipe.draw(recipe.Scene("test", "white", (circle,), True, True), 32)
    captions = ["a red circle on a white background", "a blue circle", "two large blue stars on a pink background"]
    # Shape, count, colour and background hold; shape and count without colour; nothing.
    assert of_eval.shapes_agreement([image] * 3, captions) == [1.0, 2 / 3, 0.0]
    assert of_eval.shapes_correct([image] * 3, captions) == [1.0, 0.0, 0.0]


def test_clip_score_of_each_image(monkeypatch):
    image_features, text_features = torch.eye(3, dtype=torch.double), torch.full((3, 3), 3**-0.5, dtype=torch.double)
    monkeypatch.setattr(of_eval, "load_clip", lambda name: name)
    monkeypatch.setattr(of_eval, "clip_features", lambda clip, images, prompts: (image_features, text_features))
    of_eval._loaded.cache_clear()
    reward = load_reward("unified_eval.rewards:clip_score", {"clip": "folder"})
    assert reward(grey(1, 2, 3), PROMPTS) == pytest.approx([57.735027] * 3)
    of_eval._loaded.cache_clear()

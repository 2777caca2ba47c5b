"""Optimizers, averages, schedulers, loss scale and random streams survive as safetensors and numbers."""

import json
import random

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import nn
from torch.optim.swa_utils import AveragedModel

from unified.training.state import read_state, take_state, write_state


class Run:
    """Two layers with shared weights, an average, a scheduler that moves rates and momentum, and a loss scale."""

    def __init__(self, seed=0, weight_decay=0.1, scheduler=True):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(4, 4), nn.Conv2d(1, 3, 2), nn.Linear(4, 4), nn.BatchNorm1d(4))
        model[2].weight = model[0].weight
        model[1].to(memory_format=torch.channels_last)
        self.accelerator = Accelerator()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=weight_decay)
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        self.average = AveragedModel(model)
        self.accelerator.register_for_checkpointing(self.average)
        self.scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, 20) if scheduler else None
        if scheduler:
            self.accelerator.register_for_checkpointing(self.scheduler)
        self.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=3)

    def train(self, steps):
        """Steps on inputs from all three random streams; returns what they lead to."""
        scaler = self.accelerator.scaler
        for _ in range(steps):
            x = torch.randn(5, 4) + random.gauss(0, 1) + np.random.standard_normal()
            out = self.model[3](self.model[2](self.model[0](x)))
            loss = out.pow(2).sum() + self.model[1](torch.randn(1, 1, 3, 3)).pow(2).sum()
            scaler.scale(loss).backward()
            scaler.step(self.optimizer.optimizer)
            scaler.update()
            self.optimizer.zero_grad()
            if self.scheduler is not None:
                self.scheduler.step()
            self.average.update_parameters(self.model)
        state = self.optimizer.state_dict()
        moments = [state["state"][i][name] for i in state["state"] for name in ("step", "exp_avg", "exp_avg_sq")]
        tensors = [*self.model.state_dict().values(), *self.average.state_dict().values(), *moments]
        rates = [(group["lr"], group["betas"], group["weight_decay"]) for group in state["param_groups"]]
        return tensors, [*rates, scaler.get_scale(), random.random(), np.random.rand(), torch.rand(3).tolist()]


def assert_same(ours, theirs):
    assert all(torch.equal(a, b) for a, b in zip(ours[0], theirs[0], strict=True))
    assert ours[1] == theirs[1]


def save(run, folder):
    folder.mkdir(exist_ok=True)
    state = take_state(run.accelerator)
    write_state(run.accelerator, folder, state)
    return json.loads(json.dumps(state.numbers))


def test_a_run_goes_on_bit_for_bit(tmp_path):
    random.seed(1)
    np.random.seed(2)
    run = Run()
    run.train(4)
    random.gauss(0, 1), np.random.standard_normal()  # both keep a second number for the next call
    numbers = save(run, tmp_path)
    whole = run.train(4)
    resumed = Run(seed=7)
    resumed.train(1)
    read_state(resumed.accelerator, tmp_path, numbers)
    assert resumed.model[2].weight is resumed.model[0].weight
    assert_same(resumed.train(4), whole)
    assert whole[1][1] > 64.0  # the loss scale has grown


def test_settings_win_over_the_checkpoint_where_no_scheduler_moves_them(tmp_path):
    run = Run(scheduler=False)
    run.train(2)
    numbers = save(run, tmp_path)
    changed = Run(weight_decay=0.3, scheduler=False)
    read_state(changed.accelerator, tmp_path, numbers)
    assert changed.optimizer.param_groups[0]["weight_decay"] == 0.3
    ours, theirs = (each.optimizer.state_dict()["state"] for each in (changed, run))
    assert all(torch.equal(ours[i]["exp_avg"], theirs[i]["exp_avg"]) for i in theirs)


def test_other_models_are_refused_by_name(tmp_path):
    numbers = save(Run(), tmp_path)
    other = Run()
    other.model.append(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"only in the checkpoint \[\], only here \['4.bias', '4.weight'\]"):
        read_state(other.accelerator, tmp_path, numbers)
    other = Run()
    other.model[0].bias = nn.Parameter(torch.zeros(1))  # would be filled by broadcasting the other way round
    with pytest.raises(ValueError, match=r"'0.bias' is \(4,\) in .* and \(1,\) in this run"):
        read_state(other.accelerator, tmp_path, numbers)


def test_an_optimizer_of_other_groups_is_refused(tmp_path):
    """Its state goes by number: with other groups, that of another tensor of the same shape would be taken."""
    numbers, run = save(Run(), tmp_path), Run()
    run.optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(4, 4))]})
    with pytest.raises(
        ValueError, match=r"resume: .* has 1 groups of tensors in an optimizer, this run 2; tensor parallel"
    ):
        read_state(run.accelerator, tmp_path, numbers)


def test_missing_random_streams(tmp_path):
    """An error for a process that wrote one; a process that is new says that it starts its own."""
    numbers, run = save(Run(), tmp_path), Run()
    (tmp_path / "random-0.safetensors").rename(tmp_path / "kept")
    with pytest.raises(ValueError, match=r"random stream '.*random-0.safetensors' is missing"):
        read_state(run.accelerator, tmp_path, numbers)
    with pytest.warns(UserWarning, match="random streams of 0 processes; process 0 starts one from the seed"):
        read_state(run.accelerator, tmp_path, {**numbers, "num_processes": 0})
    (tmp_path / "random-0.safetensors").write_bytes((tmp_path / "kept").read_bytes()[:-5])
    with pytest.raises(ValueError, match=r"resume: .*random-0.safetensors. cannot be read .*ncomplete"):
        read_state(run.accelerator, tmp_path, numbers)

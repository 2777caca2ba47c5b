"""Muon over matrices that are cut over processes: the steps of torch's Muon on whole matrices."""

import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from unified.training.optimizer import Muon

OPTIONS = {"lr": 0.05, "weight_decay": 0.1, "adjust_lr_fn": "match_rms_adamw"}
# Three matrices for two or four processes; seven rows cannot be cut evenly, and of three a process has none.
SHAPES = [(8, 6), (7, 8), (3, 7)]


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(columns, rows, bias=False) for rows, columns in SHAPES))


def trained(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """The weights after three steps with the same batch for all."""
    torch.manual_seed(1)
    for _ in range(3):
        model(torch.randn(5, 6)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return [p.detach().full_tensor() if isinstance(p, DTensor) else p.detach() for p in model.parameters()]


def sharded(rank: int, store: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=4)
    torch.set_num_threads(1)
    whole = network()
    expected = trained(whole, torch.optim.Muon(whole.parameters(), **OPTIONS))
    for names in (("shard",), ("replicate", "shard"), ("tp",), ("shard", "tp")):
        mesh = init_device_mesh("cpu", (4,) if len(names) == 1 else (2, 2), mesh_dim_names=names)
        model = network()
        if "tp" in names:
            last = RowwiseParallel(input_layouts=Replicate())
            parallelize_module(model, mesh["tp"], {"0": ColwiseParallel(), "1": RowwiseParallel(), "2": last})
        for layer in model if "shard" in names else ():
            fully_shard(layer, mesh=mesh["shard"] if "tp" in names else mesh)
        optimizer = Muon(model.parameters(), **OPTIONS)
        for ours, theirs in zip(trained(model, optimizer), expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
        assert all(isinstance(state["momentum_buffer"], DTensor) for state in optimizer.state.values())
    dist.destroy_process_group()


@pytest.mark.process
def test_four_processes_take_the_steps_of_one(tmp_path):
    command = [sys.executable, __file__, str(tmp_path / "store")]  # forks after the imports, which are slow
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_whole_matrices_take_the_steps_of_torch():
    ours, theirs = network(), network()
    a = trained(ours, Muon(ours.parameters(), **OPTIONS))
    b = trained(theirs, torch.optim.Muon(theirs.parameters(), **OPTIONS))
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


if __name__ == "__main__":
    mp.start_processes(sharded, args=(sys.argv[1],), nprocs=4, start_method="fork")

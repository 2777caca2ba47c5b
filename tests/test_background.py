"""Checkpoints that two processes write beside the training: what they hold, and what becomes of a write that fails."""

import json
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from accelerate import Accelerator
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from unified.training import checkpoint
from unified.training.background import Background
from unified.training.checkpoint import load_checkpoint, save_checkpoint

INPUTS = {"note": "x"}
write_state = checkpoint.write_state


def trained_by(rank: int, folder: str) -> tuple[Accelerator, nn.Module, torch.optim.Optimizer]:
    """A sharded model that an accelerator holds, and its optimizer."""
    torch.manual_seed(0)
    accelerator, model = Accelerator(cpu=True), nn.Linear(6, 5)
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    accelerator._models, accelerator._optimizers = [model], [optimizer]
    return accelerator, model, optimizer


def step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    torch.manual_seed(seed)
    model(torch.randn(3, 6)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def whole(model: nn.Module) -> list[torch.Tensor]:
    return [p.full_tensor().clone() for p in model.parameters() if isinstance(p, DTensor)]


def process(rank: int, folder: str, port: str) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    os.environ |= {"MASTER_PORT": port, "ACCELERATE_USE_CPU": "true"}
    torch.set_num_threads(1)
    accelerator, model, optimizer = trained_by(rank, folder)
    assert accelerator.num_processes == 2
    out, go_on, fails = Path(folder), threading.Event(), False

    def held(accelerator: Accelerator, folder: Path, *rest: object) -> None:
        assert go_on.wait(60)
        if fails and rank == 1:
            raise OSError("disk of process 1")
        write_state(accelerator, folder, *rest)

    checkpoint.write_state = held
    with Background(accelerator) as background:
        step(model, optimizer, 1)
        expected = whole(model)
        save_checkpoint(accelerator, out, 1, 10, 2, {}, INPUTS, background)
        for seed in (2, 3):  # with collectives of the training while the threads have theirs to come
            step(model, optimizer, seed)
        after = whole(model)
        background.check()
        assert not (out / "step-00000001").exists()
        go_on.set()
        background.wait()
        assert (out / "step-00000001").is_dir()
        assert load_checkpoint(accelerator, out / "step-00000001") == (1, 10)
        assert all(map(torch.equal, whole(model), expected))
        for seed in (2, 3):
            step(model, optimizer, seed)
        assert all(map(torch.equal, whole(model), after))
        save_checkpoint(accelerator, out, 3, 30, 2, {}, INPUTS, background)
        save_checkpoint(accelerator, out, 4, 40, 2, {}, INPUTS, background)  # waits for the one before
        assert (out / "step-00000003").is_dir()
        background.wait()
        assert sorted(path.name for path in out.iterdir()) == ["step-00000003", "step-00000004"]
        # Process 1 cannot write: it says so; process 0 learns it as the connection ends.
        fails = True
        save_checkpoint(accelerator, out, 5, 50, 2, {}, INPUTS, background)
        if rank == 1:
            with pytest.raises(OSError, match="disk of process 1"):
                background.wait()
    Path(f"{folder}.{rank}").write_text("as expected")
    os._exit(0)


@pytest.mark.process
def test_two_processes_write_beside_the_training(tmp_path):
    command = [sys.executable, __file__, str(tmp_path / "checkpoints")]  # forks after the imports, which are slow
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert (tmp_path / "checkpoints.1").is_file(), done.stderr[-3000:]
    names = [path.name for path in (tmp_path / "checkpoints").glob("step-*")]
    assert sorted(names) == ["step-00000003", "step-00000004"]
    state = json.loads((tmp_path / "checkpoints" / names[0] / "trainer_state.json").read_text())
    assert any(name.startswith("model/") for name in state["files"])  # in pieces, of both
    assert not (tmp_path / "checkpoints.0").is_file() and done.returncode != 0


if __name__ == "__main__":
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    mp.start_processes(process, args=(sys.argv[1], port), nprocs=2, start_method="fork")

"""Runs on several CPU processes, which are forked after the imports: these take longer than a tiny run.

    python tests/forked.py JOBS.json

Each job is a dict: ``processes``; and either ``train``, the arguments of ``load_config``, with ``environment``, what `accelerate
launch` would set, and ``meshes``, the shapes of all meshes that weights are cut over; or ``backbones``, configurations.
"""

import json
import os
import socket
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from accelerate import PartialState
from accelerate.utils import DistributedType
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, AutoModelForCausalLM

from unified.training import loop
from unified.training.config import load_config
from unified.training.tensor_parallel import cut_decoder, whole


def work(rank, port, job):
    """One process of a job."""
    numbers = {"MASTER_PORT": port, "WORLD_SIZE": job["processes"], "RANK": rank, "LOCAL_RANK": rank}
    os.environ |= {name: str(number) for name, number in numbers.items()}
    os.environ |= {"MASTER_ADDR": "localhost", "ACCELERATE_USE_CPU": "true", **job.get("environment", {})}
    torch.set_num_threads(1)
    if "train" in job:
        train(job)
    else:
        compare(job)
    sys.stdout.flush()
    os._exit(0)  # without Python's clean-up, in which gloo's threads may abort


def train(job):
    """A training whose weights are cut as expected. Accelerate has FSDP2 and tensor parallelism for GPUs only."""
    PartialState(cpu=True)
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    step = loop.train_step

    def checked(accelerator, model, *rest):
        found = {tuple(p.device_mesh.shape) if isinstance(p, DTensor) else () for p in model.parameters()}
        assert found == {tuple(shape) for shape in job["meshes"]}, found
        return step(accelerator, model, *rest)

    loop.train_step = checked
    loop.train(load_config(*job["train"]))


def compare(job):
    """Logits and gradients of backbones that are cut, and of the same ones whole."""
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (job["processes"],), mesh_dim_names=("tp",))
    accelerator = SimpleNamespace(
        parallelism_config=SimpleNamespace(tp_size=job["processes"]), torch_device_mesh={"tp": mesh}
    )
    for settings in job["backbones"]:
        results = []
        for cut in (False, True):
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings))
            for p in model.parameters():
                torch.nn.init.normal_(p, std=0.2)
            if cut:
                cut_decoder(SimpleNamespace(backbone=model), accelerator)
                assert any(isinstance(p, DTensor) for p in model.parameters())
            logits = model(torch.arange(20).reshape(2, 10)).logits
            logits.square().mean().backward()
            results.append({"logits": logits} | {name: whole(p.grad) for name, p in model.named_parameters()})
        torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)


if __name__ == "__main__":
    for each in json.loads(Path(sys.argv[1]).read_text()):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            number = free.getsockname()[1]
        mp.start_processes(work, args=(number, each), nprocs=each["processes"], start_method="fork")

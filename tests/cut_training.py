"""What tests of tensor parallelism run on several CPU processes: a training, or a comparison of backbones.

    torchrun --nproc_per_node N tests/cut_training.py JOB.json

A job is a dict with either ``train``, the arguments of ``load_config``, and ``meshes``, the shapes of all meshes that weights are
cut over; or ``backbones``, configurations.
"""

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import DistributedType
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, AutoModelForCausalLM

from unified.training import loop
from unified.training.config import load_config
from unified.training.tensor_parallel import cut_decoder, whole


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
    processes = dist.get_world_size()
    mesh = init_device_mesh("cpu", (processes,), mesh_dim_names=("tp",))
    accelerator = SimpleNamespace(parallelism_config=SimpleNamespace(tp_size=processes), torch_device_mesh={"tp": mesh})
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
    job = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(1)
    train(job) if "train" in job else compare(job)
    sys.stdout.flush()
    os._exit(0)  # without Python's clean-up, in which gloo's threads may abort

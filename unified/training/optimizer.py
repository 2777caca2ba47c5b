"""Optimizers of a run: AdamW for everything, or Muon for the decoder's matrices."""

import math
from collections.abc import Callable
from itertools import product
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.optim._muon import _adjust_lr, _zeropower_via_newtonschulz

from unified.training.config import OptimizerConfig
from unified.training.tensor_parallel import alike


class Muon(torch.optim.Muon):
    """torch's Muon, also for matrices that are cut over processes, all of them over the same.

    Those are gathered one at a time, as an update is orthogonalised whole. Each process orthogonalises every n-th of them and
    hands the pieces out, so that n processes share the work. Momentum stays cut.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One optimizer step."""
        parameters = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        if not any(isinstance(p, DTensor) for p in parameters):
            return super().step(closure)
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            matrices = [p for p in group["params"] if p.grad is not None]
            count = math.prod(mesh.size() for mesh, _ in _cuts(matrices[0]))
            for start in range(0, len(matrices), count):
                self._step_together(matrices[start : start + count], group)
        return loss

    def _step_together(self, matrices: list[DTensor], group: dict[str, Any]) -> None:
        """A step of at most as many matrices as processes: the i-th process orthogonalises the i-th."""
        meshes = [mesh for mesh, _ in _cuts(matrices[0])]
        owners = list(product(*(range(mesh.size()) for mesh in meshes)))
        here, own = tuple(mesh.get_local_rank() for mesh in meshes), None
        for p, owner in zip(matrices, owners, strict=False):
            whole = _whole(self._momentum(p, group).bfloat16())  # in which it is orthogonalised
            own = whole if owner == here else own
        if own is not None:
            own = _zeropower_via_newtonschulz(own, group["ns_coefficients"], group["ns_steps"], group["eps"])
        for p, owner in zip(matrices, owners, strict=False):
            update = own if owner == here else torch.empty(p.shape, dtype=torch.bfloat16, device=p.device)
            assert update is not None
            # As the matrix was cut, by tensor parallelism first; what others than the owner hand out there is not used later.
            for (mesh, dim), rank in reversed(list(zip(_cuts(p), owner, strict=True))):
                update = distribute_tensor(update.contiguous(), mesh, [Shard(dim)], src_data_rank=rank).to_local()
            p.mul_(1 - group["lr"] * group["weight_decay"])
            p.to_local().add_(update, alpha=-_adjust_lr(group["lr"], group["adjust_lr_fn"], p.shape))

    def _momentum(self, p: DTensor, group: dict[str, Any]) -> Tensor:
        """What is orthogonalised: the gradient's running mean, with a look ahead for Nesterov."""
        state, gradient, momentum = self.state[p], p.grad, group["momentum"]
        assert gradient is not None
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(gradient)
        mean: Tensor = state["momentum_buffer"].lerp_(gradient, 1 - momentum)
        return gradient.lerp(mean, momentum) if group["nesterov"] else mean


def _whole(tensor: Tensor) -> Tensor:
    assert isinstance(tensor, DTensor)
    return tensor.full_tensor()


def _cuts(p: DTensor) -> list[tuple[DeviceMesh, int]]:
    """The processes that a tensor is cut over, and the dimension, for each cut: those of FSDP2, inside of one replica, then
    those of tensor parallelism, whose pieces FSDP2 cuts again.
    """
    mesh, names = p.device_mesh, p.device_mesh.mesh_dim_names
    return [
        (mesh if names is None else mesh[names[i]], cast(Shard, placement).dim)
        for i, placement in enumerate(p.placements)
        if not isinstance(placement, Replicate)
    ]


def build_optimizers(model: nn.Module, config: OptimizerConfig, *modules: nn.Module) -> list[torch.optim.Optimizer]:
    """One AdamW, or for ``muon`` a Muon over the matrices inside the decoder's layers and an AdamW over the rest.

    The steps of Muon (Jordan et al. 2024) are scaled to the size of AdamW's (arXiv 2502.16982), so both share the learning
    rate. Weight decay acts on matrices only. ``modules`` are trained beside the model, by AdamW.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    use_muon = config.name == "muon"
    hidden = [p for name, p in named if use_muon and p.ndim == 2 and ".layers." in name]
    taken = {id(p) for p in hidden}
    rest = [p for _, p in named if id(p) not in taken] + [p for module in modules for p in module.parameters()]
    decayed = (([p for p in rest if p.ndim >= 2], config.weight_decay), ([p for p in rest if p.ndim < 2], 0.0))
    groups = [{"params": part, "weight_decay": decay} for group, decay in decayed for part in alike(group) or [[]]]
    betas = (config.betas[0], config.betas[1])
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(groups, lr=config.learning_rate, betas=betas, fused=True)
    ]
    optimizers += [
        Muon(part, lr=config.learning_rate, weight_decay=config.weight_decay, adjust_lr_fn="match_rms_adamw")
        for part in alike(hidden)
    ]
    return optimizers

"""Optimizers of a run: AdamW for everything, or Muon for the decoder's matrices."""

import torch
from torch import nn

from unified.training.config import OptimizerConfig


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
    groups = [
        {"params": [p for p in rest if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0},
    ]
    betas = (config.betas[0], config.betas[1])
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(groups, lr=config.learning_rate, betas=betas, fused=True)
    ]
    if hidden:
        optimizers.append(
            torch.optim.Muon(
                hidden, lr=config.learning_rate, weight_decay=config.weight_decay, adjust_lr_fn="match_rms_adamw"
            )
        )
    return optimizers

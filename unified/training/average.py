"""An exponential moving average of the weights that a run trains."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from unified.training.tensor_parallel import alike


class Average(nn.Module):
    """The average, laid out and cut over processes as the weights are; frozen weights have none.

    ``module`` holds its tensors by the names that they have in the model.
    """

    n_averaged: Tensor

    def __init__(self, model: nn.Module, decay: float):
        """Start with the weights of ``model`` as they are."""
        super().__init__()
        self._weights = [p for p in model.parameters() if p.requires_grad]
        self._average = get_ema_multi_avg_fn(decay)
        self.module = nn.Module()
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                *path, last = name.split(".")
                _submodule(self.module, path).register_buffer(last, parameter.detach().clone())
        self.register_buffer("n_averaged", torch.tensor(0, dtype=torch.long))

    def restart(self) -> None:
        """Forget the past: the next update copies the weights."""
        self.n_averaged.zero_()

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights as they are now."""
        averages = list(self.module.buffers())
        if self.n_averaged == 0:
            for average, weight in zip(averages, self._weights, strict=True):
                average.copy_(weight)
        else:
            for part, weights in zip(alike(averages), alike(self._weights), strict=True):
                self._average(part, [weight.detach() for weight in weights], self.n_averaged)
        self.n_averaged += 1

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside, the model holds the average, and the average its weights; afterwards both are as they were."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        for average, weight in zip(self.module.buffers(), self._weights, strict=True):
            kept = weight.detach().clone()  # one tensor more at a time
            weight.copy_(average)
            average.copy_(kept)


def _submodule(module: nn.Module, path: list[str]) -> nn.Module:
    for name in path:
        if name not in module._modules:
            module.add_module(name, nn.Module())
        module = module.get_submodule(name)
    return module

"""Dropout on what attention and MLP add to the residual stream, for families whose configuration has none."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from unified.model.backbone import decoder_layers


class DropOutput:
    """A forward hook that drops a share of a module's output while it is trained."""

    def __init__(self, share: float):
        self.share = share

    def __call__(self, module: nn.Module, inputs: Any, output: Any) -> Any:
        """The output, of attention the first of several, with a share of its numbers at 0 and the others scaled up."""
        if isinstance(output, Tensor):
            return F.dropout(output, self.share, module.training)
        return (F.dropout(output[0], self.share, module.training), *output[1:])


def add_dropout(backbone: Any, share: float) -> None:
    """Drop ``share`` of the output of every attention and MLP of a decoder in training; no weight gets another name.

    Raises:
        ValueError: if its layers have no ``self_attn`` and ``mlp``.
    """
    for layer in decoder_layers(backbone):
        for name in ("self_attn", "mlp"):
            part = getattr(layer, name, None)
            if not isinstance(part, nn.Module):
                raise ValueError(
                    f"dropout: the layers of {type(backbone).__name__} have no {name}; leave it out, or choose another family."
                )
            if not any(isinstance(hook, DropOutput) for hook in part._forward_hooks.values()):
                part.register_forward_hook(DropOutput(share))

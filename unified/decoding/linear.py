"""Linear layers for decoding: dense, or with 8-bit weights."""

import warnings

import torch
from torch import Tensor

# Without VNNI, products of two full bytes overflow the 16-bit sums of the kernels; 7-bit inputs do not.
_REDUCE_RANGE = not torch.cpu._is_vnni_supported()


class Dense:
    """``x W^T + b``. The weights ``(out, in)`` are kept turned: the rows of a decoding step are few, and a product with a
    wide ``(in, out)`` matrix reads memory in order, up to twice as fast on a CPU.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None):
        self.turned, self.bias = weight.detach().T.contiguous(), None if bias is None else bias.detach()

    def __call__(self, x: Tensor) -> Tensor:
        """``(..., in)`` to ``(..., out)``."""
        product = x @ self.turned
        return product if self.bias is None else product + self.bias

    def add_to(self, residual: Tensor, x: Tensor) -> Tensor:
        """``residual + x W^T + b`` in one product; ``(N, out)`` and ``(N, in)``."""
        total = torch.addmm(residual, x, self.turned)
        return total if self.bias is None else total + self.bias


class Int8:
    """Weights in 8 bits with one scale per output, inputs quantised as they come; CPU only.

    Raises:
        ValueError: if the weights are not float32 on the CPU.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None):
        if weight.device.type != "cpu" or weight.dtype != torch.float32:
            raise ValueError(f"int8: needs float32 weights on the CPU, got {weight.dtype} on {weight.device}.")
        scale = weight.detach().abs().amax(dim=1).clamp_min(torch.finfo(torch.float32).tiny).double() / 127
        with warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", message="torch.quantize_per"
            )  # going in a later torch than the one required
            quantized = torch.quantize_per_channel(
                weight.detach(), scale, torch.zeros(len(scale), dtype=torch.int64), 0, torch.qint8
            )
        self._packed = torch.ops.quantized.linear_prepack(quantized, None if bias is None else bias.detach())

    def __call__(self, x: Tensor) -> Tensor:
        """``(..., in)`` to ``(..., out)``."""
        return torch.ops.quantized.linear_dynamic(x, self._packed, _REDUCE_RANGE)

    def add_to(self, residual: Tensor, x: Tensor) -> Tensor:
        """``residual`` plus the layer's output."""
        return self(x).add_(residual)

"""Linear layers for decoding: dense, or with 8-bit weights."""

import warnings

import torch
from torch import Tensor

# Steps between 0 and the largest input of a row. Without VNNI, products of two full bytes overflow the 16-bit sums of the
# kernels; 7-bit inputs do not.
LEVELS = 127 if torch.cpu._is_vnni_supported() else 63
_TINY = torch.finfo(torch.float32).tiny


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


def round_rows(weight: Tensor) -> Tensor:
    """``(out, in)`` in 8 bits, the largest of each row at 127."""
    scale = (weight.abs().amax(dim=1) / 127).clamp_min(_TINY).double()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.quantize_per")  # going in a later torch than the one required
        return torch.quantize_per_channel(weight, scale, torch.zeros(len(scale), dtype=torch.int64), 0, torch.qint8)


class Int8:
    """Weights in 8 bits with one scale per output, inputs quantised as they come with one scale per row; CPU only.

    A row is scaled by its own largest value, so its result does not depend on the rows beside it.

    Raises:
        ValueError: if the weights are not float32 on the CPU.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None):
        if weight.device.type != "cpu" or weight.dtype != torch.float32:
            raise ValueError(f"int8: needs float32 weights on the CPU, got {weight.dtype} on {weight.device}.")
        self._packed = torch.ops.quantized.linear_prepack(round_rows(weight.detach()), None)
        self.bias = None if bias is None else bias.detach()

    def __call__(self, x: Tensor) -> Tensor:
        """``(..., in)`` to ``(..., out)``."""
        largest = x.abs().amax(dim=-1, keepdim=True).clamp_min_(_TINY)
        product = self.scaled(x / largest).mul_(largest)
        return product if self.bias is None else product.add_(self.bias)

    def scaled(self, x: Tensor) -> Tensor:
        """``x W^T`` for inputs in [-1, 1], rounded to steps of ``1 / LEVELS``."""
        return torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(
            x, 1 / LEVELS, LEVELS + 1, self._packed
        )

    def add_to(self, residual: Tensor, x: Tensor) -> Tensor:
        """``residual`` plus the layer's output."""
        return self(x).add_(residual)

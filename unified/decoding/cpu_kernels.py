"""Linear layers for decoding: dense, in oneDNN's own order, or with 8-bit weights."""

import warnings

import torch
import torch.nn.functional as F
from torch import Tensor

# Steps between 0 and the largest input of a row. Without VNNI, products of two full bytes overflow the 16-bit sums of the
# kernels; 7-bit inputs do not.
LEVELS = 127 if torch.cpu._is_vnni_supported() else 63
_TINY = torch.finfo(torch.float32).tiny
_FEWEST_ROWS = 4  # oneDNN takes longer for one or two rows than for four


class Dense:
    """``x W^T + b`` on any device. The weights ``(out, in)`` are kept turned: the rows of a decoding step are few, and a
    product with a wide ``(in, out)`` matrix reads memory in order, up to twice as fast on a CPU.
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


class Packed:
    """``x W^T + b`` with the weights in oneDNN's own order: on a CPU up to twice as fast as :class:`Dense`, most with the
    few rows of a decoding step. A row's result is the same whatever rows are beside it, to the bit where this was tried. A
    compiler does not see into it. Only for weights that it :meth:`takes`.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None):
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach())
        self._bias = None if bias is None else bias.detach()

    @staticmethod
    def takes(weight: Tensor) -> bool:
        """Whether oneDNN has quick products for the weight's dtype on its device."""
        known = torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
        if weight.device.type != "cpu" or not known:
            return False
        if weight.dtype == torch.bfloat16:
            return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
        return weight.dtype == torch.float32

    def __call__(self, x: Tensor) -> Tensor:
        """``(..., in)`` to ``(..., out)``."""
        rows = x.reshape(-1, x.shape[-1])
        count = len(rows)
        if count < _FEWEST_ROWS:
            rows = F.pad(rows, (0, 0, 0, _FEWEST_ROWS - count))
        product = torch.ops.mkldnn._linear_pointwise(rows, self._packed, self._bias, "none", [], "")
        return product[:count].view(*x.shape[:-1], -1)

    def add_to(self, residual: Tensor, x: Tensor) -> Tensor:
        """``residual + x W^T + b``; ``(N, out)`` and ``(N, in)``."""
        return self(x).add_(residual)


def _round_rows(weight: Tensor) -> Tensor:
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
        self._packed = torch.ops.quantized.linear_prepack(_round_rows(weight.detach()), None)
        self.bias = None if bias is None else bias.detach()

    def __call__(self, x: Tensor) -> Tensor:
        """``(..., in)`` to ``(..., out)``."""
        largest = x.abs().amax(dim=-1, keepdim=True).clamp_min_(_TINY)
        product = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(
            x / largest, 1 / LEVELS, LEVELS + 1, self._packed
        ).mul_(largest)
        return product if self.bias is None else product.add_(self.bias)

    def add_to(self, residual: Tensor, x: Tensor) -> Tensor:
        """``residual`` plus the layer's output."""
        return self(x).add_(residual)

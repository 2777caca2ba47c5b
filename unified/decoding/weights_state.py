"""What a decoder was made of: tells whether a model's weights or adapters have changed since."""

from collections.abc import Hashable
from itertools import chain

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper
from torch import nn


def weights_state(model: nn.Module) -> Hashable:
    """Equal as long as no weight is replaced or changed in place and the same adapters count with the same scale.

    Changes through ``tensor.data`` are not seen: they leave no trace.
    """
    tensors = tuple(
        (tensor.data_ptr(), tensor.dtype, None if tensor.is_inference() else tensor._version)
        for tensor in chain(model.parameters(), model.buffers())
    )
    adapters = tuple(
        (
            tuple(module.active_adapters),
            tuple(getattr(module, "merged_adapters", ())),
            module.disable_adapters,
            tuple(getattr(module, "scaling", {}).items()),
        )
        for module in model.modules()
        if isinstance(module, BaseTunerLayer | ModulesToSaveWrapper)
    )
    return tensors, adapters

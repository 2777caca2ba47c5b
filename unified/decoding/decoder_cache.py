"""The decoder that is kept between calls, made again when the model has changed since."""

from collections.abc import Hashable, Mapping

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from unified.decoding.decoder import Decoder
from unified.decoding.fused_llama import make_decoder
from unified.decoding.steering import SteeredDecoder, steer
from unified.lora.base import base_of
from unified.model.modeling import UnifiedForCausalLM


class DecoderCache:
    """Keeps a decoder, which holds copies of the weights, and makes it again when the model has changed.

    Changes are found by :func:`weights_state`, however they are made: nothing has to report them.
    """

    def __init__(self) -> None:
        self._options: dict[str, bool] = {}
        self._decoder: Decoder | None = None
        self._state: Hashable = None

    def get(self, model: UnifiedForCausalLM | PeftModel, weights: Mapping[str, float] | None = None) -> Decoder:
        """The decoder of a model as it is now, steered by adapters with ``weights``; other weights alone cost nothing.

        Raises:
            ValueError: as :func:`unified.decoding.steering.steer`.
        """
        base = base_of(model)
        state = (weights_state(base), tuple(weights or ()))
        if self._decoder is None or self._decoder.model is not base or self._state != state:
            self._decoder = None  # its memory first
            if weights and isinstance(model, PeftModel):
                self._decoder = steer(model, weights, **self._options)
            else:
                self._decoder = make_decoder(base, **self._options)
            self._state = state
        decoder = self._decoder
        return decoder.weighted(weights) if weights and isinstance(decoder, SteeredDecoder) else decoder

    def configure(self, model: UnifiedForCausalLM, **options: bool) -> None:
        """Make the decoder now and from now on with these options of :func:`make_decoder`; an error changes nothing."""
        state = (weights_state(model), ())
        self._decoder, self._state, self._options = make_decoder(model, **options), state, options

    def free(self) -> None:
        """Free the decoder's memory; the next call makes it again."""
        self._decoder = None


def weights_state(model: nn.Module) -> Hashable:
    """Equal as long as no weight changes and the same adapters are active, with the same scales, merged and enabled alike.

    A sum over the bits of each weight sees writes through ``tensor.data`` too, as when ``peft`` hot-swaps an adapter; they
    leave no other trace. It takes less than a step of decoding, which reads all weights as well. Values that such a write
    only rearranges within a tensor are not seen.
    """
    tensors = [*model.parameters(), *model.buffers()]
    weights = tuple(
        # A weak reference, because the address of a tensor that is gone may be given to the next one.
        (StorageWeakRef(tensor.untyped_storage()), tensor.storage_offset(), tensor.dtype, _version(tensor))
        for tensor in tensors
    )
    adapters = tuple(
        (
            tuple(module.active_adapters),
            tuple(getattr(module, "merged_adapters", ())),
            module.disable_adapters,
            tuple((name, float(scale)) for name, scale in getattr(module, "scaling", {}).items()),
        )
        for module in model.modules()
        if isinstance(module, BaseTunerLayer | ModulesToSaveWrapper)
    )
    return weights, adapters, tuple(_sum_of_bits(tensor) for tensor in tensors)


def _version(tensor: Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version


def _sum_of_bits(tensor: Tensor) -> int:
    """All bits of a tensor as integers, added up: eight bytes at a time, which is as fast as memory is read."""
    flat, size = tensor.detach().reshape(-1), tensor.element_size()
    whole = not (flat.numel() * size % 8 or flat.storage_offset() * size % 8)
    return int(flat.view(torch.int64 if whole else torch.uint8).sum())

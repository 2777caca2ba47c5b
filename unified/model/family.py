"""Whether a family of decoders does what the unified model relies on: found out by running a few tokens, not by its name."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from unified.model.masks import masked_arguments


class _KeysAndValues(Cache):
    """All that the decoding of this library carries from one position to the next."""

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.kept: list[tuple[Tensor, Tensor]] = []

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        if layer_idx == len(self.kept):
            self.kept.append((key_states, value_states))
        else:
            key, value = self.kept[layer_idx]
            self.kept[layer_idx] = torch.cat([key, key_states], dim=2), torch.cat([value, value_states], dim=2)
        return self.kept[layer_idx]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.kept[layer_idx][0].shape[2] if self.kept else 0


def check_family(backbone: Any, text_logits: Callable[[Tensor], Tensor], positions: str) -> None:
    """Run four tokens through a backbone and check what the unified model relies on.

    Args:
        backbone: the language model, its rotary embedding inside a :class:`unified.model.rotary.GridRotary`.
        text_logits: what the unified model makes of hidden states.
        positions: as in :class:`unified.UnifiedConfig`.

    Raises:
        ValueError: if the text logits differ, decoding with a cache of keys and values alone is not a full pass (state-space
            and convolution layers carry more along), or :class:`GridRotary` cannot take the rotary embedding apart.
    """
    if _on_gpus_only(backbone):
        return
    decoder, family, angles = backbone.base_model, type(backbone).__name__, []
    with _evaluation(backbone) as ids:
        hook = decoder.rotary_emb.rotary.register_forward_hook(lambda module, given, found: angles.append(found))
        try:
            hidden = decoder(input_ids=ids, use_cache=False).last_hidden_state
            logits = backbone(input_ids=ids, use_cache=False).logits
        except Exception as error:  # any error of a decoder that needs more of its rotary embedding
            raise ValueError(
                f"backbone: {family} does not run in a unified model ({error!r}); choose another family."
            ) from error
        finally:
            hook.remove()
        if not torch.equal(text_logits(hidden), logits):
            raise ValueError(
                f"backbone: {family} computes its text logits in a custom way; choose another family, such as Llama, Qwen, "
                "Mistral, Gemma or Granite."
            )
        pairs = all(isinstance(found, tuple) and len(found) == 2 for found in angles)
        if not pairs or (positions != "1d" and not all(torch.equal(*cos.chunk(2, dim=-1)) for cos, _ in angles)):
            raise ValueError(
                f"positions: {positions!r} needs a rotary embedding in two halves, and that of {family} is laid out differently; "
                f"{'use positions=1d, or' if pairs else 'choose'} another family."
            )
        try:
            cache, steps = _KeysAndValues(), range(ids.shape[1])
            stepwise = [_run(decoder, ids[:, step : step + 1], step, cache=cache, use_cache=True) for step in steps]
            distance = _distance(torch.cat(stepwise, dim=1), _run(decoder, ids, 0, use_cache=False))
            reason = None if distance <= _tolerance(hidden) else f"a relative error of {distance:.2g}"
        except Exception as error:  # any error of a layer that looks for another kind of state
            reason = repr(error)
        if reason is not None:
            raise ValueError(
                f"backbone: {family} cannot decode with a cache of keys and values alone ({reason}); choose a family with "
                "attention, and no other state, in every layer."
            )


def check_packing(backbone: Any) -> None:
    """Raises ValueError if a document sees the document before it when both are packed into one row."""
    if _on_gpus_only(backbone):
        return
    decoder = backbone.base_model
    with _evaluation(backbone) as ids:
        rows, index = torch.cat([ids.flip(1), ids], dim=1), torch.arange(ids.shape[1], device=ids.device)
        documents = torch.tensor([[0, 1]], device=ids.device).repeat_interleave(ids.shape[1], dim=1)
        arguments = {
            "position_ids": index.repeat(2)[None],
            **masked_arguments(decoder.config, decoder.dtype, None, documents),
        }
        packed = decoder(input_ids=rows, use_cache=False, **arguments).last_hidden_state
        alone = decoder(input_ids=ids, use_cache=False).last_hidden_state
        if not _distance(packed[:, ids.shape[1] :], alone) <= _tolerance(alone):
            raise ValueError(
                f"data.pack: {type(backbone).__name__} does not keep packed documents apart; leave data.pack out, or choose "
                "another family."
            )


def _on_gpus_only(backbone: Any) -> bool:
    """Whether nothing can be checked here, because flash attention needs a GPU and the model is not there yet."""
    return str(backbone.config._attn_implementation).startswith("flash")


@contextmanager
def _evaluation(backbone: Any) -> Iterator[Tensor]:
    """No gradients and no dropout; gives ids ``(1, 4)`` to run."""
    training = backbone.training
    backbone.eval()
    try:
        with torch.no_grad():
            yield torch.arange(4, device=backbone.device)[None] % backbone.config.vocab_size
    finally:
        backbone.train(training)


def _run(decoder: Any, ids: Tensor, start: int, **options: Any) -> Tensor:
    """Hidden states ``(B, T, D)`` of ids that begin at position ``start``, placed by explicit coordinates as in decoding."""
    index = torch.arange(start, start + ids.shape[1], device=ids.device)[None]
    decoder.rotary_emb.coordinates = index[..., None].expand(-1, -1, 2).float()
    try:
        return decoder(input_ids=ids, position_ids=index, **options).last_hidden_state
    finally:
        decoder.rotary_emb.coordinates = None


def _distance(states: Tensor, wanted: Tensor) -> float:
    return float((states.float() - wanted.float()).norm() / wanted.float().norm())


def _tolerance(states: Tensor) -> float:
    return 1e-3 if states.dtype == torch.float32 else 0.1

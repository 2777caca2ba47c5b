"""What the unified model returns."""

from dataclasses import dataclass

from torch import Tensor
from transformers.modeling_outputs import CausalLMOutputWithPast


@dataclass
class UnifiedOutput(CausalLMOutputWithPast):
    """Output of :class:`unified.UnifiedForCausalLM`.

    Attributes:
        loss: weighted mean over all supervised positions, in nats.
        text_loss, image_loss: means over the positions whose target is text, or image codes; None without any.
        logits: ``(B, S, V_text)``, only without labels.
        image_logits: ``(B, S, K)``, only without labels and with ``image_inputs``, of a model whose positions predict one code
            each by one head.
        image_states: ``(N, P or 1, D)``, on request: what the image head scores for each of ``image_targets``.
        log_probs: ``(N, P)``, on request: log-probabilities of the codes of each of ``image_targets``, 0 where there is none.
        hidden_states: on request, of every layer; with labels without the last position, ``(B, S - 1, D)`` each.
    """

    text_loss: Tensor | None = None
    image_loss: Tensor | None = None
    image_logits: Tensor | None = None
    image_states: Tensor | None = None
    log_probs: Tensor | None = None

"""The language model of Chameleon (arXiv 2405.09818) alone: a Llama with normalised queries and keys of every head.

transformers has it inside a model with an image tokenizer, whose logits of codes are masked. Its layers are used as they are.
"""

from typing import Any

from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, LlamaModel
from transformers.models.chameleon.modeling_chameleon import ChameleonDecoderLayer, ChameleonSwinDecoderLayer


class ChameleonTextConfig(LlamaConfig):
    """A Llama's configuration, and ``swin_norm``: whether layers normalise what they add, as in the model of 34B."""

    model_type = "chameleon_text"

    swin_norm: bool = False
    model_parallel_size: int = 1


class _Layer(ChameleonDecoderLayer):
    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return super().forward(*args, **kwargs)[0]


class _SwinLayer(ChameleonSwinDecoderLayer):
    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return super().forward(*args, **kwargs)[0]


class ChameleonTextModel(LlamaModel):
    """The decoder."""

    config_class = ChameleonTextConfig
    _no_split_modules = ["_Layer", "_SwinLayer"]  # noqa: RUF012

    def __init__(self, config: ChameleonTextConfig):
        super().__init__(config)
        layer: Any = _SwinLayer if config.swin_norm else _Layer
        self.layers = nn.ModuleList(layer(config, index) for index in range(config.num_hidden_layers))
        self.post_init()


class ChameleonTextForCausalLM(LlamaForCausalLM):
    """The decoder and its head."""

    config_class = ChameleonTextConfig
    _no_split_modules = ["_Layer", "_SwinLayer"]  # noqa: RUF012

    def __init__(self, config: ChameleonTextConfig):
        super().__init__(config)
        self.model = ChameleonTextModel(config)
        self.post_init()


AutoConfig.register(ChameleonTextConfig.model_type, ChameleonTextConfig)
AutoModel.register(ChameleonTextConfig, ChameleonTextModel)
AutoModelForCausalLM.register(ChameleonTextConfig, ChameleonTextForCausalLM)

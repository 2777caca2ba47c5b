"""The settings of the model that a run trains: where it comes from, its adapter, the way it predicts images."""

from dataclasses import dataclass, field
from typing import Any

from unified.config import UnifiedConfig, language_config
from unified.lora.modality_gate import check_modality
from unified.model.init import EMBED_KINDS, HEAD_KINDS
from unified.model.quantization import BITS, check_quantization
from unified.prediction.plan import Prediction
from unified.settings import check_choice, check_range, did_you_mean

ATTENTION = ("sdpa", "eager", "flex_attention", "flash_attention_2", "flash_attention_3")
# Fields of UnifiedConfig that come from the tokenizers and the backbone, so that `model.options` cannot set them.
_DERIVED = {
    "text_config", "codebook_size", "boi_token_id", "eoi_token_id", "image_tokenizer_fingerprint",
    "text_tokenizer_fingerprint", "new_image_tables", "prediction", "patch_sizes",
}  # fmt: skip


@dataclass
class ModelConfig:
    """Where the model comes from: exactly one of ``pipeline``, ``backbone`` and ``architecture``."""

    pipeline: str | None = None  # continue from a pipeline folder
    backbone: str | None = None  # attach image tables to a pretrained language model
    architecture: dict[str, Any] | None = None  # a new backbone: `model_type` and fields of its transformers config
    image_tokenizer: str | None = None  # folder, published weights or Hub name; a pipeline brings its own
    text_tokenizer: str | None = None  # default: that of the backbone or the pipeline
    boi: str | None = None  # token that opens an image, for a pretrained text tokenizer
    eoi: str | None = None  # token that closes an image
    image_init: str | None = (
        None  # text (on a backbone by default), normal (else), or codebook (similar codes start alike)
    )
    head_init: str = "normal"  # likewise normal, text, zero (a loss of ln K) or tied-like (rows of the image embedding)
    options: dict[str, Any] = field(  # fields of UnifiedConfig: positions, loss weights, ...;
        default_factory=dict  # vision: {encoder: FOLDER or Hub name, layer: -2, pool: 1} reads images by its features
    )
    gradient_checkpointing: bool = False  # less memory for activations, about a third more time
    gradient_checkpointing_layers: int = 1  # with it, one layer in so many: more memory and less time again
    attention: str | None = None  # while training: flex_attention, flash_attention_2, eager, ...; default: sdpa
    dtype: str = (
        "float32"  # or bfloat16, of the frozen base of an adapter: half of its memory; the adapter is in float32
    )
    quantization: str | None = None  # 4bit or 8bit, of the frozen base of an adapter; needs bitsandbytes and a pipeline

    def check(self) -> None:
        """Raises ValueError for a field that is unknown, missing, or contradicts another."""
        given = [name for name in ("pipeline", "backbone", "architecture") if getattr(self, name)]
        if len(given) != 1:
            raise ValueError(f"model: set exactly one of pipeline, backbone and architecture, got {given or 'none'}.")
        if not self.pipeline and not self.image_tokenizer:
            raise ValueError("model.image_tokenizer: missing; a new model needs the folder of its tokenizer.")
        condition = self.options.get("conditioning")
        kind = condition.get("kind", "none") if isinstance(condition, dict) else condition
        if kind is None and self.architecture and not self.text_tokenizer:
            raise ValueError("model.text_tokenizer: missing; a new model needs the folder of its tokenizer.")
        if kind is not None and kind != "class":
            raise ValueError(f"model.options.conditioning: kind {kind!r} cannot be trained here; use class.")
        if self.pipeline and "conditioning" in self.options:
            raise ValueError("model.options.conditioning: a pipeline has its own; leave it out.")
        if kind is not None and (not self.architecture or self.text_tokenizer):
            raise ValueError(
                "model.options.conditioning: a class-conditional model reads no text; it needs a model.architecture and no "
                "model.text_tokenizer."
            )
        if self.boi is not None and self.boi == self.eoi:
            raise ValueError(f"model.boi, model.eoi: both are {self.boi!r}; use two different tokens.")
        for name, kinds, default in (("image_init", EMBED_KINDS, None), ("head_init", HEAD_KINDS, "normal")):
            kind = getattr(self, name)
            if kind == default:
                continue
            check_choice(f"model.{name}", kind, kinds)
            if self.pipeline:
                raise ValueError(f"model.{name}: {kind!r}, but a pipeline has its image tables; leave it out.")
        if self.attention is not None:
            check_choice("model.attention", self.attention, ATTENTION)
        check_range("model.", self, "[1, inf)", "gradient_checkpointing_layers")
        if self.gradient_checkpointing_layers > 1 and not self.gradient_checkpointing:
            raise ValueError(
                "model.gradient_checkpointing_layers: without gradient_checkpointing there is none; set that to true too."
            )
        check_choice("model.dtype", self.dtype, ("float32", "bfloat16"))
        if self.architecture and self.dtype != "float32":
            raise ValueError(
                f"model.dtype: {self.dtype!r} is for a frozen base, and a new model is trained; leave it out."
            )
        if self.quantization is not None:
            check_choice("model.quantization", self.quantization, tuple(BITS))
            if not self.pipeline:
                raise ValueError(
                    "model.quantization: for the pipeline of an adapter; save the model as one, name it there."
                )
            check_quantization("model.quantization")
        self._check_options()
        if self.architecture:
            self._check_architecture(self.architecture)

    def _check_options(self) -> None:
        known = [name for name in UnifiedConfig.__annotations__ if name not in _DERIVED]
        for name in self.options:
            if name not in known:
                raise ValueError(f"model.options: {name!r} is unknown or not free{did_you_mean(name, known)}")
        try:
            UnifiedConfig(**self.options)
        except ValueError as error:
            raise ValueError(f"model.options: {' '.join(str(error).split())}") from error

    @staticmethod
    def _check_architecture(architecture: dict[str, Any]) -> None:
        config = language_config(architecture, "model.architecture")
        known = vars(type(config)())
        for name in architecture:  # the class keeps what it does not know, and translates older names
            if name in vars(config) and name not in known:
                raise ValueError(
                    f"model.architecture: {type(config).__name__} has no field {name!r}{did_you_mean(name, list(known))}"
                )


@dataclass
class LoraSettings:
    """Train an adapter instead of the model; see ``unified.lora.adapters.attach_lora``."""

    rank: int = 16  # rank of the update
    alpha: int | None = None  # the update is scaled by alpha / rank; default: the rank
    dropout: float = 0.0  # on the input of the adapter
    target_modules: list[str] | None = None  # names of linear layers; null: those of attention and MLP
    train_image_tables: bool | None = (
        None  # copies of the image tables in the adapter; null: if the base's are untrained
    )
    modality: str = "all"  # text or image: act on positions of that modality only
    use_rslora: bool = False  # scale by alpha / sqrt(rank), arXiv 2312.03732
    use_dora: bool = False  # magnitude and direction apart, arXiv 2402.09353

    def check(self) -> None:
        """Raises ValueError for a field that is out of range or contradicts another."""
        check_range("lora.", self, "[1, inf)", "rank", "alpha")
        check_range("lora.", self, "[0, 1)", "dropout")
        if self.target_modules is not None and not self.target_modules:
            raise ValueError("lora.target_modules: empty; name the linear layers that get an update.")
        check_modality(self.modality, self.use_dora)


@dataclass
class PredictionConfig:
    """How images are predicted: the order of their codes, and how codes enter. With ``model.pipeline``, the new way of it."""

    order: str = "raster"  # or rows, rows_at_once, diagonals, regions, cells, spread, locality, random
    size: int = 0  # cells a side, regions a side or passes, for orders that take a number; 0 for the order's default
    merge: str = "one"  # or channel: windows of codes share a position, also in sampling (Token-Shuffle)
    window: int | None = None  # side of the windows of channel; default 2
    chained: bool = False  # whether each code of a window is predicted from those before it there too

    def build(self) -> dict[str, Any]:
        """The value of ``UnifiedConfig.prediction``. Raises ValueError for a field that is unknown or out of range."""
        given = {name: value for name, value in vars(self).items() if value is not None}
        Prediction.from_mapping(given)
        return given

"""Configuration of a unified text-and-image language model."""

import math
import re
import reprlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

from unified_tokenizers.fields import YES_OR_NO, Rule, check_fields, is_finite, is_whole, sizes, whole

_FINGERPRINT: Rule = ("a text or null", lambda value: value is None or isinstance(value, str))
_WEIGHT: Rule = ("a finite number of at least 0", lambda value: is_finite(value) and value >= 0)
_WHOLE_NUMBERS, _are_whole = sizes()
_FIELDS: dict[str, Rule] = {
    "codebook_size": whole(),
    "image_factors": ("null or two whole numbers of at least 2", lambda value: value is None or _are_factors(value)),
    "image_projection": ("null or a whole number of at least 1", lambda value: value is None or is_whole(value)),
    "boi_token_id": whole(0),
    "eoi_token_id": whole(0),
    "image_tokenizer_fingerprint": _FINGERPRINT,
    "text_tokenizer_fingerprint": _FINGERPRINT,
    "new_image_tables": YES_OR_NO,
    "image_grids": ("null or a list of code grids [height, width]", lambda value: value is None or _are_grids(value)),
    "patch_sizes": (f"null or {_WHOLE_NUMBERS}", lambda value: value is None or _are_whole(value)),
    "normalized_range": ("a finite number above 0", lambda value: is_finite(value) and value > 0),
    "text_loss_weight": _WEIGHT,
    "image_loss_weight": _WEIGHT,
    "prompt_template": (
        "a text with {prompt} in it, once",
        lambda value: isinstance(value, str) and value.count("{prompt}") == 1,
    ),
    "null_prompt": ("a text", lambda value: isinstance(value, str)),
    "null_prompt_repeats": YES_OR_NO,
    "chat_template": (
        "null or a Jinja template that looks at message['role']",
        lambda value: value is None or (isinstance(value, str) and "role" in value),
    ),
    "code_pixels": whole(),
    "image_frame": (
        "null or a mapping of tokens inside an image",
        lambda value: value is None or isinstance(value, dict),
    ),
    "dropout": ("a number in [0, 1)", lambda value: is_finite(value) and 0 <= value < 1),
    "conditioning": ("null or a description with a kind", lambda value: value is None or isinstance(value, dict)),
    "vision": ("null or a mapping with an encoder", lambda value: value is None or isinstance(value, dict)),
}
# Fields of `vision`; `length` and `width` are those of what the encoder makes.
_VISION: dict[str, Rule] = {
    "encoder": ("a folder or a name on the Hub", lambda value: isinstance(value, str) and bool(value.strip())),
    "layer": ("a whole number", lambda value: type(value) is int),
    "pool": whole(),
    "fingerprint": _FINGERPRINT,
    "length": whole(),
    "width": whole(),
}
_SIZES = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim", "max_position_embeddings",
)  # fmt: skip
MAX_LAYERS, MAX_SIZE = 10_000, 2**24  # beyond any model; what fits into memory is another question
# Kinds of conditions that are no text, and the sizes that describe each.
CONDITION_SIZES = {"class": ("classes",), "features": ("length", "features")}
_LAYERS, _WIDTH = re.compile(r"(^|_)layers?$"), re.compile(r"(_size|_dim|_heads|_experts)$|^n_embd$")


@dataclass(frozen=True)
class Vocabulary:
    """The one id space: text ids are ``[0, text_vocab_size)``, image code c is ``text_vocab_size + c``.

    ``eos_token_id`` ends a text in the loss; any of ``eos_token_ids``, where a backbone has several, ends a written one.
    """

    text_vocab_size: int
    codebook_size: int
    boi_token_id: int
    eoi_token_id: int
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    pad_token_id: int = 0
    eos_token_ids: tuple[int, ...] = ()


class Coordinates(NamedTuple):
    """Where image codes sit for the rotary embedding; the fields are those of :class:`UnifiedConfig`."""

    positions: str
    coarse_positions: str
    normalized_range: float


class UnifiedConfig(PreTrainedConfig):
    """Configuration of :class:`unified.UnifiedForCausalLM`.

    Args:
        text_config: configuration of the decoder backbone (any ``AutoModelForCausalLM``), as a config or a dict with
            ``model_type``.
        codebook_size: number of image codes K.
        boi_token_id, eoi_token_id: text ids that open and close an image span.
        image_tokenizer_fingerprint: the image tokenizer whose codes the model was trained on.
        text_tokenizer_fingerprint: the text tokenizer of its text ids; a pipeline sets it where it is None.
        new_image_tables: whether the image tables are untrained, as ``from_backbone`` makes them: an adapter has to bring
            its own then. Training them clears it.
        image_grids: code grids ``[h, w]`` that the model was trained on.
        patch_sizes: sides of the patches that it, or an adapter loaded into it, was trained on, 1 for codes; None where that is
            not known.
        positions: ``1d`` (running index) or ``2d`` (row and column) inside image spans; ``llamagen`` as LlamaGen has it
            (see :class:`unified.model.rotary.GridRotary`).
        coarse_positions: where a patch of a coarse stage sits: ``center`` of its fine-grid cells, ``unit`` stride as
            in the paper (arXiv 2412.15321), or ``normalized`` to ``normalized_range`` (arXiv 2406.10797).
        normalized_range: extent of the grid's longer side for ``normalized``.
        loss_normalization: ``position`` weighs every predicted position alike, ``token`` weighs a patch by its p*p codes.
        text_loss_weight, image_loss_weight: weights of the two parts in the mean.
        conditioning: the condition in front of an image that is no text (see :mod:`unified.model.prefix`):
            ``{"kind": "class", "classes": N}``, with ``names`` of the N classes where they are known, or
            ``{"kind": "features", "length": P, "features": F}``; None without.
        dropout: share of numbers that training drops from the embeddings and from the output of every attention and MLP,
            as LlamaGen does (0.1).
        prediction: order and merge of image codes (see :class:`unified.prediction.plan.Prediction`): a mapping with ``order``,
            ``size``, ``merge`` and ``window``; None for next-token prediction.
        image_projection: width of a hidden layer in front of the image head, as Janus has (see
            :class:`unified.model.image_head.ImageProjection`); None without.
        image_factors: ``[A, B]`` with A * B = ``codebook_size``: image tables of A and of B rows in place of one of each (see
            :mod:`unified.model.factored`); None without.
        image_frame: text tokens inside an image, which are given: ``before``, lists of ids by code grids such as ``90x90``,
            ``row_end`` or ``between_rows``, and ``after`` (see :class:`unified.prediction.frame.Frame`); None without.
        prompt_template, null_prompt, null_prompt_repeats, code_pixels: how captions are written in front of an image, and what
            stands for none: ``template``, ``null``, ``null_repeats`` and ``code_pixels`` of
            :class:`unified.prompts.PromptFormat`.
        vision: the frozen vision encoder whose features stand for images that are read (see :mod:`unified.model.vision`):
            ``encoder``, ``layer``, ``pool``, and its own ``fingerprint``, ``length`` and ``width``; None without.
        chat_template: how conversations were written that the model was trained on (see :mod:`unified.conversation`); None
            if it was trained on none.
    """

    model_type = "unified"
    sub_configs_defaults = {  # noqa: RUF012
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="llama"),
    }

    text_config: Any = None  # a dict only until __post_init__
    codebook_size: int = 512
    boi_token_id: int = 0
    eoi_token_id: int = 0
    image_tokenizer_fingerprint: str | None = None
    text_tokenizer_fingerprint: str | None = None
    new_image_tables: bool = False
    image_grids: list[list[int]] | None = None
    patch_sizes: list[int] | None = None
    positions: str = "2d"
    coarse_positions: str = "center"
    normalized_range: float = 16.0
    loss_normalization: str = "position"
    text_loss_weight: float = 1.0
    image_loss_weight: float = 1.0
    conditioning: dict[str, Any] | None = None
    dropout: float = 0.0
    prediction: dict[str, Any] | None = None
    image_projection: int | None = None
    image_factors: list[int] | None = None
    image_frame: dict[str, Any] | None = None
    prompt_template: str = "{prompt}"
    null_prompt: str = ""
    null_prompt_repeats: bool = False
    chat_template: str | None = None
    code_pixels: int = 1
    vision: dict[str, Any] | None = None

    def __post_init__(self, **kwargs: object) -> None:
        """Build the backbone's config and refuse values that are out of range."""
        if isinstance(self.text_config, dict):
            self.text_config = language_config(self.text_config, "text_config")
        elif not isinstance(self.text_config, PreTrainedConfig | None):
            raise ValueError(f"text_config: {self.text_config!r} must be a configuration, or its fields by name.")
        given = self.text_config is not None  # transformers makes defaults too, to compare with
        super().__post_init__(**kwargs)
        check_fields(self, _FIELDS)
        if self.codebook_size > MAX_SIZE:
            raise ValueError(f"codebook_size: {self.codebook_size} must lie in [1, {MAX_SIZE}].")
        if self.image_factors is not None and given and math.prod(self.image_factors) != self.codebook_size:
            raise ValueError(
                f"image_factors: {self.image_factors} are not two factors of the codebook of {self.codebook_size} codes; "
                "choose two whose product it is."
            )
        if self.conditioning is not None:
            check_conditioning(self.conditioning)
        if self.vision is not None:
            check_vision(self.vision)
            if self.conditioning is not None:
                raise ValueError("vision: a model with conditioning reads no images; leave one of them out.")
        _choice("positions", self.positions, ("1d", "2d", "llamagen"))
        _choice("coarse_positions", self.coarse_positions, ("center", "unit", "normalized"))
        _choice("loss_normalization", self.loss_normalization, ("position", "token"))
        if self.image_frame is not None and self.positions != "1d":
            raise ValueError(
                f"image_frame: counts its tokens as text does, positions {self.positions!r} do not; use 1d."
            )
        if self.text_config is not None:
            check_sizes("text_config", self.text_config.to_dict())
            language = self.text_config.get_text_config()
            if language is not self.text_config:
                raise ValueError(
                    f"text_config: {self.text_config.model_type!r} holds more than a language model; give its language part, "
                    f"{language.model_type!r}."
                )
            self.tie_word_embeddings = self.text_config.tie_word_embeddings
            for name in ("boi_token_id", "eoi_token_id"):
                if not 0 <= getattr(self, name) < self.text_config.vocab_size:
                    raise ValueError(
                        f"{name}: {getattr(self, name)} is outside the backbone's vocabulary of "
                        f"{self.text_config.vocab_size}; use one of its unused or reserved ids."
                    )
            if given and self.boi_token_id == self.eoi_token_id:
                raise ValueError(f"boi_token_id, eoi_token_id: both are {self.boi_token_id}; use two different ids.")

    @property
    def vocabulary(self) -> Vocabulary:
        """The id space shared by text and image tokens."""
        text = self.text_config
        given = text.eos_token_id if isinstance(text.eos_token_id, list) else [text.eos_token_id]
        ends = tuple(end for end in given if end is not None)
        eos = ends[0] if ends else None
        pad = text.pad_token_id if text.pad_token_id is not None else (eos or 0)
        return Vocabulary(
            text.vocab_size, self.codebook_size, self.boi_token_id, self.eoi_token_id, text.bos_token_id, eos, pad, ends
        )

    @property
    def classes(self) -> int | None:
        """Number of classes of a class-conditional model, None of any other."""
        given = self.conditioning or {}
        return given["classes"] if given.get("kind") == "class" else None

    @property
    def class_names(self) -> list[str] | None:
        """Names of the classes in order, each of one or more words for it with commas between; None if they have none."""
        return (self.conditioning or {}).get("names")

    def add_patch_sizes(self, sizes: Iterable[int]) -> None:
        """Note that it is trained on patches of these sides, too; where earlier ones are not known, all stay unknown."""
        if self.patch_sizes is not None:
            self.patch_sizes = sorted({*self.patch_sizes, *sizes})

    @property
    def coordinates(self) -> Coordinates:
        """Where image codes sit for the rotary embedding."""
        return Coordinates(self.positions, self.coarse_positions, self.normalized_range)


def language_config(fields: dict[str, Any], name: str) -> PreTrainedConfig:
    """The configuration of a backbone from its fields, ``model_type`` among them.

    Raises:
        ValueError: for an unknown model, or a value that it cannot have; it calls the fields ``name``.
    """
    kind = fields.get("model_type")
    if kind is None:
        raise ValueError(f"{name}: needs a model_type such as 'llama' to choose the backbone.")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        raise ValueError(f"{name}: model_type {kind!r} is unknown to transformers; use one such as 'llama'.")
    check_sizes(name, fields)  # a config writes a list of its layers
    for size in _SIZES:
        value = fields.get(size)
        if value is not None and not is_whole(value):
            raise ValueError(f"{name}: {size} {value!r} must be a whole number of at least 1.")
    try:
        return AutoConfig.for_model(**fields)
    except (StrictDataclassError, ValueError, TypeError, AttributeError, KeyError) as error:  # each model has its own
        raise ValueError(f"{name}: {kind!r} cannot have these values ({' '.join(str(error).split())}).") from error


def check_conditioning(given: Any) -> None:
    """Raises ValueError if a condition is of an unknown kind, or a size is missing or no number above 0."""
    if not isinstance(given, Mapping):
        raise ValueError(f"conditioning: {given!r} must be a mapping such as {{kind: class, classes: 1000}}.")
    kind = given.get("kind")
    if not isinstance(kind, str) or kind not in CONDITION_SIZES:
        raise ValueError(f"conditioning: kind {kind!r} is unknown; use one of {sorted(CONDITION_SIZES)}.")
    sizes = CONDITION_SIZES[kind]
    missing = [name for name in sizes if name not in given]
    if missing:
        raise ValueError(f"conditioning: {missing} missing for kind {kind!r}.")
    unknown = sorted(set(given) - {"kind", *sizes, *(["names"] if kind == "class" else [])})
    if unknown:
        raise ValueError(f"conditioning: {unknown} unknown for kind {kind!r}; leave them out.")
    for name in sizes:
        if type(given[name]) is not int or not 1 <= given[name] <= MAX_SIZE:
            raise ValueError(f"conditioning.{name}: {given[name]!r} must be a whole number in [1, {MAX_SIZE}].")
    names = given.get("names")
    if names is None:
        return
    if not isinstance(names, list) or not all(isinstance(name, str) and name.strip() for name in names):
        raise ValueError(f"conditioning.names: {reprlib.repr(names)} must be a list of names that are not empty.")
    if len(names) != given["classes"]:
        raise ValueError(f"conditioning.names: {len(names)} names for {given['classes']} classes; give one each.")


def check_vision(given: Mapping[str, Any]) -> None:
    """Raises ValueError if a description of a vision encoder has no name of it, an unknown field, or a value that does not fit."""
    if "encoder" not in given:
        raise ValueError("vision.encoder: missing; give the folder or the Hub name of a vision model of transformers.")
    for name, value in given.items():
        if name not in _VISION:
            raise ValueError(f"vision: {name!r} is unknown; use some of {sorted(_VISION)}.")
        wanted, fits = _VISION[name]
        if not fits(value):
            raise ValueError(f"vision.{name}: {value!r} must be {wanted}.")


def head_dim(text_config: Any) -> int:
    """Width of an attention head of a backbone."""
    return getattr(text_config, "head_dim", None) or text_config.hidden_size // text_config.num_attention_heads


def check_sizes(prefix: str, fields: Mapping[str, Any]) -> None:
    """Raises ValueError if a backbone's number of layers, or a width, is beyond every model's; nothing is built for that."""
    for name, value in fields.items():
        most = MAX_LAYERS if _LAYERS.search(str(name)) else MAX_SIZE if _WIDTH.search(str(name)) else math.inf
        if type(value) is int and value > most:
            raise ValueError(f"{prefix}.{name}: {value} is beyond {most}; correct it.")


def _are_grids(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(
        isinstance(grid, list | tuple) and len(grid) == 2 and all(map(is_whole, grid)) for grid in value
    )


def _are_factors(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) == 2 and all(is_whole(factor, least=2) for factor in value)


def _choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name}: {value!r} is unknown; use one of {allowed}.")

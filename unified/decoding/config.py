"""Settings of decoding: how a code is sampled, and the table of modes. Needs no torch, so a command line starts at once."""

import math
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from unified.config import UnifiedConfig
    from unified.prediction.plan import Prediction

_MOST = 1e4  # of a guidance scale, and of what a temperature multiplies logits by


@dataclass(frozen=True)
class Sampling:
    """How a code or a text token is sampled.

    Args:
        guidance_scale: classifier-free guidance ``u + s * (c - u)`` on the logits; 1 switches it off.
        temperature: divides the logits; below 1 sharpens.
        top_k: keep the k most likely codes; 0 keeps all.
        top_p: keep the smallest set of codes with at least this probability; 1 keeps all.
        guidance_schedule: the scale over an image: ``constant``; ``linear`` or ``cosine``, rising from 1 at the first code
            to ``guidance_scale`` at the last; or a function of the share of the codes sampled, in [0, 1], to a scale.
        group_temperature: multiplies the temperature where a pass samples more than one cell, which do not see one another: below 1
            they agree more often. No effect in raster order.

    Raises:
        ValueError: naming the setting that is out of its range.
    """

    guidance_scale: float = 1.0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    guidance_schedule: str | Callable[[float], float] = "constant"
    group_temperature: float = 1.0

    def __post_init__(self) -> None:
        for name in ("guidance_scale", "temperature", "top_k", "top_p", "group_temperature"):
            _check_finite(name, getattr(self, name))
        if self.guidance_scale < 1:
            raise ValueError(f"guidance_scale: {self.guidance_scale} must be at least 1; 1 switches guidance off.")
        if self.guidance_scale > _MOST:
            raise ValueError(f"guidance_scale: {self.guidance_scale} must be at most {_MOST:g}.")
        if self.temperature < 1 / _MOST:  # logits have to stay finite
            least = "above 0" if self.temperature <= 0 else f"at least {1 / _MOST:g}"
            raise ValueError(f"temperature: {self.temperature} must be {least}; use top_k=1 for the most likely code.")
        if self.group_temperature <= 0 or self.temperature * self.group_temperature < 1 / _MOST:
            raise ValueError(
                f"group_temperature: {self.group_temperature} times the temperature of {self.temperature} must be at least "
                f"{1 / _MOST:g}; use top_k=1 for the most likely codes."
            )
        if self.top_k < 0 or int(self.top_k) != self.top_k:
            raise ValueError(f"top_k: {self.top_k} must be a whole number, 0 to keep all codes.")
        object.__setattr__(self, "top_k", int(self.top_k))
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p: {self.top_p} must lie in (0, 1]; 1 keeps all codes.")
        if not callable(self.guidance_schedule) and self.guidance_schedule not in tuple(SCHEDULES):
            raise ValueError(
                f"guidance_schedule: {self.guidance_schedule!r} is unknown; use one of {tuple(SCHEDULES)} or a function."
            )

    @property
    def guided(self) -> bool:
        """Whether an unconditional row is needed."""
        return self.guidance_scale > 1 or callable(self.guidance_schedule)

    def among(self, cells: int) -> "Sampling":
        """How each of so many cells is sampled that one pass samples."""
        if cells == 1 or self.group_temperature == 1:
            return self
        return replace(self, temperature=self.temperature * self.group_temperature, group_temperature=1.0)

    def scales(self, steps: int) -> list[float]:
        """Guidance scale of each of ``steps`` codes. Raises ValueError as :meth:`check_schedule`."""
        self.check_schedule(steps)
        shares = [step / max(steps - 1, 1) for step in range(steps)]
        if callable(self.guidance_schedule):
            return [self.guidance_schedule(share) for share in shares]
        rise = SCHEDULES[self.guidance_schedule]
        return [1 + (self.guidance_scale - 1) * rise(share) for share in shares]

    def check_schedule(self, steps: int) -> None:
        """Refuse a custom schedule with a value below 1, too large or not finite for one of ``steps`` codes.

        Raises:
            ValueError: naming the value.
        """
        if not callable(self.guidance_schedule):
            return
        for step in range(steps):
            scale = self.guidance_schedule(step / max(steps - 1, 1))
            _check_finite("guidance_schedule", scale)
            if scale < 1:
                raise ValueError(f"guidance_schedule: falls to {scale}; a scale must be at least 1.")
            if scale > _MOST:
                raise ValueError(f"guidance_schedule: rises to {scale}; a scale must be at most {_MOST:g}.")


SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda share: 1.0,
    "linear": lambda share: share,
    "cosine": lambda share: (1 - math.cos(math.pi * share)) / 2,
}


def _check_finite(name: str, value: object) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not abs(value) <= sys.float_info.max:  # type: ignore[arg-type, operator]  # a whole number may be larger
        raise ValueError(f"{name}: {value!r} is not a finite number.")


def check_steer(steer: object) -> None:
    """Refuse anything but adapters' names with finite weights, or None. Raises ValueError."""
    if steer is None:
        return
    if not isinstance(steer, Mapping) or not all(isinstance(name, str) for name in steer):
        raise ValueError(f"steer: {steer!r} is no mapping of adapters' names to weights, such as {{'colours': 0.5}}.")
    for name, weight in steer.items():
        _check_finite(f"steer.{name}", weight)


def _any(prediction: "Prediction") -> bool:
    return True


def _code_by_code(prediction: "Prediction") -> bool:
    return prediction.is_raster and prediction.merge.side == 1 and prediction.frame is None


def _windows_of_codes(prediction: "Prediction") -> bool:
    return prediction.merge.side == 1 and prediction.frame is None and not prediction.way.any_order


def _any_order(prediction: "Prediction") -> bool:
    return prediction.way.any_order and not prediction.merge.chained


@dataclass(frozen=True)
class DecodingMode:
    """A way to decode images.

    Args:
        about: one line for help texts and pages.
        path: ``module:function``, imported on first use; the function has the arguments of
            :func:`unified.decoding.decode.iterate_codes` and yields the codes so far ``(B, n)``.
        needs: what a model has to be like, in words.
        suits: whether a model's way of prediction is like that.
        negatives: whether it reads negative prompts.
        patch_size: side of the patches that a model has to be trained with.
    """

    about: str
    path: str
    needs: str = "any order"
    suits: Callable[["Prediction"], bool] = _any
    negatives: bool = True
    patch_size: int = 1

    def can_use(self, config: "UnifiedConfig") -> bool:
        """Whether it can decode images of a model, by its way of prediction and the patches that it was trained on, if known."""
        trained = self.patch_size == 1 or config.patch_sizes is None or self.patch_size in config.patch_sizes
        return trained and self.suits(_prediction_of(config))

    def __call__(self, *args: Any, **kwargs: Any) -> Iterator[Any]:
        """Iterate over the codes of a batch, -1 where an image has none yet."""
        module, function = self.path.split(":")
        return getattr(import_module(module), function)(*args, **kwargs)


_WINDOWS = ("a fixed order with merge 'one', without tokens between codes", _windows_of_codes)
_RASTER = ("the order 'raster' with merge 'one', without tokens between codes", _code_by_code)

DECODING_MODES = {
    "plain": DecodingMode("pass by pass in the order of the model", "unified.decoding.decode:iterate_codes"),
    "jacobi": DecodingMode(
        "several codes at a time, same image", "unified.decoding.speculative:jacobi_codes", *_RASTER
    ),
    "sjd": DecodingMode(
        "several codes at a time, same distribution", "unified.decoding.speculative:sjd_codes", *_RASTER
    ),
    "gsd": DecodingMode("fastest, approximate", "unified.decoding.speculative:gsd_codes", *_RASTER),
    "zipar": DecodingMode(
        "several rows at a time, approximate", "unified.decoding.staggered_rows:zipar_codes", *_RASTER
    ),
    "assd": DecodingMode(
        "models of any order: several codes at a time, exact",
        "unified.decoding.any_order_speculation:assd_codes",
        "the order 'random' with codes that are not chained",
        _any_order,
    ),
    "autoguided": DecodingMode(
        "models trained with 2 x 2 patches, too: guided away from their own coarse predictions",
        "unified.decoding.coarse_guidance:autoguided_codes",
        *_WINDOWS,
        negatives=False,
        patch_size=2,
    ),
    "coarse_cfg": DecodingMode(
        "models trained with 2 x 2 patches, too: guidance with a coarse unconditional side",
        "unified.decoding.coarse_guidance:coarse_cfg_codes",
        *_WINDOWS,
        patch_size=2,
    ),
}


def _prediction_of(config: "UnifiedConfig") -> "Prediction":
    from unified.prediction.plan import Prediction  # which needs torch

    return Prediction.of(config)


def modes_for(config: "UnifiedConfig") -> dict[str, DecodingMode]:
    """The modes that can decode images of a model."""
    return {name: mode for name, mode in DECODING_MODES.items() if mode.can_use(config)}


def check_decoding(decoding: str, config: "UnifiedConfig") -> None:
    """Refuse a mode that does not suit a model's way of prediction, or needs patches that it was not trained on.

    Raises:
        ValueError: naming the mode, what it needs, what the model has and the modes that suit it.
    """
    mode, prediction = DECODING_MODES[decoding], _prediction_of(config)
    if not mode.suits(prediction):
        raise ValueError(
            f"decoding: {decoding!r} needs {mode.needs}; the model has the order {prediction.order!r} with merge "
            f"{prediction.merge.kind!r}, use one of {tuple(modes_for(config))}."
        )
    if not mode.can_use(config):
        raise ValueError(
            f"decoding: {decoding!r} needs a model that was trained with patches of {mode.patch_size} x {mode.patch_size} codes, "
            f"too; this one's patch sizes are {config.patch_sizes}. Train it with schedule.patch_sizes, or use one of "
            f"{tuple(modes_for(config))}."
        )

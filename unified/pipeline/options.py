"""How images are sampled: one set of options for the pipeline, the engine, the command line and the page."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from unified.decoding.config import DECODING_MODES, SCHEDULES, Sampling, check_steer

# How images are sampled where neither the call nor the pipeline says so; a pipeline may be saved with others.
SAMPLING: dict[str, Any] = {
    "guidance_scale": 3.0, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "guidance_schedule": "constant", "decoding": "plain",
    "group_temperature": 1.0,
}  # fmt: skip


@dataclass(frozen=True)
class GenerationOptions:
    """How images are sampled, whatever their prompts and generators are. Needs no torch.

    Args:
        height, width: size in pixels; one that the model was trained on. Default: the first of them.
        guidance_scale: classifier-free guidance; 1 switches it off. For this and the options of :data:`SAMPLING`, None is
            the pipeline's default, see :meth:`filled`.
        num_images_per_prompt: images per caption; those of one caption are adjacent in the output.
        temperature, top_k, top_p, guidance_schedule, group_temperature: see :class:`unified.decoding.Sampling`.
        decoding: a name in :data:`unified.decoding.DECODING_MODES`: ``plain``; ``jacobi`` (the same images) or ``sjd`` (the
            same distribution), often faster for few images; ``gsd``, faster and not exact; ``zipar``, several rows at
            a time, not exact, for batches. Those are for raster order; ``assd`` is for any order: codes from the
            joint distribution, which plain decoding in groups only comes near to; ``autoguided`` and ``coarse_cfg``: guidance by
            coarse predictions, of models trained with 2 x 2 patches, too.
        steer: weights of loaded reward adapters by their names: their log-probabilities are added to the logits (GenARM, see
            :mod:`unified.decoding.steering`); below 0 steers away. Not among the defaults of a pipeline.

    Attributes:
        sampling: the options that concern a single code, None being the value in :data:`SAMPLING`.

    Raises:
        ValueError: naming the option that is out of its range.
    """

    height: int | None = None
    width: int | None = None
    guidance_scale: float | None = None
    num_images_per_prompt: int = 1
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    guidance_schedule: str | Callable[[float], float] | None = None
    decoding: str | None = None
    group_temperature: float | None = None
    steer: Mapping[str, float] | None = None
    sampling: Sampling = field(init=False, repr=False)

    def __post_init__(self) -> None:
        for name in ("height", "width"):
            if getattr(self, name) is not None:
                check_whole(name, getattr(self, name))
        check_whole("num_images_per_prompt", self.num_images_per_prompt)
        given = {name: getattr(self, name) for name in SAMPLING if getattr(self, name) is not None}
        decoding = {**SAMPLING, **given}["decoding"]
        if decoding not in tuple(DECODING_MODES):  # of a tuple, because it may not be hashable
            raise ValueError(f"decoding: {decoding!r} is unknown; use one of {tuple(DECODING_MODES)}.")
        check_steer(self.steer)
        of_a_code = {name: value for name, value in {**SAMPLING, **given}.items() if name != "decoding"}
        object.__setattr__(self, "sampling", Sampling(**of_a_code))

    @classmethod
    def from_mapping(cls, given: Mapping[str, Any]) -> "GenerationOptions":
        """Options by their names. Raises ValueError for a name that is none of them."""
        names = [each.name for each in fields(cls) if each.init]
        for name in given:
            if name not in names:
                raise ValueError(f"{name}: is no option; the options are {', '.join(names)}.")
        return cls(**given)

    def to_mapping(self) -> dict[str, Any]:
        """The options by their names."""
        return {each.name: getattr(self, each.name) for each in fields(self) if each.init}

    def filled(self, defaults: Mapping[str, Any]) -> "GenerationOptions":
        """The same with a pipeline's ``defaults``, then those of :data:`SAMPLING`, in place of None."""
        values = {**SAMPLING, **defaults}
        return replace(self, **{name: values[name] for name in SAMPLING if getattr(self, name) is None})


def check_defaults(sampling: Any) -> dict[str, Any]:
    """The sampling defaults of a pipeline, with numbers of the types that calls take; None and null stand for none.

    ``negative_prompt``, a text, may stand among them.

    Raises:
        ValueError: for a name that is not in :data:`SAMPLING`, a value out of its range, or what JSON cannot hold.
    """
    if sampling is None:
        return {}
    if not isinstance(sampling, Mapping):
        raise ValueError(f"sampling: {sampling!r} is not a mapping of {', '.join(SAMPLING)}.")
    given = {name: value for name, value in sampling.items() if value is not None}
    for name in given:
        if name not in (*SAMPLING, "negative_prompt"):
            known = ", ".join([*SAMPLING, "negative_prompt"])
            raise ValueError(f"sampling: {name!r} is no default of a pipeline; these are {known}.")
    if not isinstance(given.get("negative_prompt", ""), str):
        raise ValueError(f"sampling.negative_prompt: {given['negative_prompt']!r} is not a text.")
    for name, choices in (("guidance_schedule", SCHEDULES), ("decoding", DECODING_MODES)):
        if name in given and not isinstance(given[name], str):
            raise ValueError(f"sampling.{name}: {given[name]!r} cannot be saved; name one of {tuple(choices)}.")
    try:
        GenerationOptions(**{name: value for name, value in given.items() if name in SAMPLING})
    except ValueError as error:
        raise ValueError(f"sampling.{error}") from error
    return given


def check_whole(name: str, value: Any, least: int = 1, most: int | None = None) -> None:
    """Refuse anything but a whole number from ``least`` to ``most``. Raises ValueError, which calls it ``name``."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least or (most is not None and value > most):
        limits = f"of at least {least}" if most is None else f"from {least} to {most}"
        raise ValueError(f"{name}: {value!r} must be a whole number {limits}.")

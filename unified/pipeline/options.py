"""How images are sampled: one set of options for the pipeline, the engine, the command line and the page."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from unified.decoding.config import DECODING_MODES, Sampling


@dataclass(frozen=True)
class GenerationOptions:
    """How images are sampled, whatever their prompts and generators are. Needs no torch.

    Args:
        height, width: size in pixels; one that the model was trained on. Default: the first of them.
        guidance_scale: classifier-free guidance; 1 switches it off.
        num_images_per_prompt: images per caption; those of one caption are adjacent in the output.
        temperature, top_k, top_p, guidance_schedule: see :class:`unified.decoding.Sampling`.
        decoding: a name in :data:`unified.decoding.DECODING_MODES`: ``plain``; ``jacobi`` (the same images) or ``sjd`` (the
            same distribution), often faster for few images; ``gsd``, faster and not exact. Those are for raster order;
            ``assd`` is for any order: codes from the joint distribution, which plain decoding in groups only comes near to.

    Attributes:
        sampling: the options that concern a single code.

    Raises:
        ValueError: naming the option that is out of its range.
    """

    height: int | None = None
    width: int | None = None
    guidance_scale: float = 3.0
    num_images_per_prompt: int = 1
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    guidance_schedule: str | Callable[[float], float] = "constant"
    decoding: str = "plain"
    sampling: Sampling = field(init=False, repr=False)

    def __post_init__(self) -> None:
        for name in ("height", "width"):
            if getattr(self, name) is not None:
                check_whole(name, getattr(self, name))
        check_whole("num_images_per_prompt", self.num_images_per_prompt)
        if self.decoding not in tuple(DECODING_MODES):
            raise ValueError(f"decoding: {self.decoding!r} is unknown; use one of {tuple(DECODING_MODES)}.")
        sampling = Sampling(self.guidance_scale, self.temperature, self.top_k, self.top_p, self.guidance_schedule)
        object.__setattr__(self, "sampling", sampling)

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


def check_whole(name: str, value: Any, least: int = 1, most: int | None = None) -> None:
    """Refuse anything but a whole number from ``least`` to ``most``. Raises ValueError, which calls it ``name``."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least or (most is not None and value > most):
        limits = f"of at least {least}" if most is None else f"from {least} to {most}"
        raise ValueError(f"{name}: {value!r} must be a whole number {limits}.")

"""The objectives by name, and from a run's settings to its objectives."""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any, cast

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from unified.settings import did_you_mean
from unified.training.objectives.arra import ARRA
from unified.training.objectives.base import Objective
from unified.training.objectives.cca import CCA
from unified.training.objectives.dpo import DPO
from unified.training.objectives.genarm import GenARM
from unified.training.objectives.likelihood import Likelihood
from unified.training.objectives.one_token_rollout import OneTokenRollout
from unified.training.objectives.rear import ReAR

OBJECTIVES: dict[str, type[Objective]] = {
    kind.name: kind for kind in (Likelihood, CCA, DPO, GenARM, ReAR, ARRA, OneTokenRollout)
}


def build_objectives(given: Sequence[Any]) -> list[Objective]:
    """The objectives that the entries of ``objectives`` describe: each a name, a weight and its settings.

    Raises:
        ValueError: if there is none or one is named twice, or for an unknown name or key, or a value of the wrong type.
    """
    if not given:
        raise ValueError(f"objectives: empty; list one or more of {', '.join(OBJECTIVES)}.")
    objectives = [_objective(entry) for entry in given]
    names = [objective.name for objective in objectives]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"objectives: {name!r} is listed {names.count(name)} times; give it one weight.")
    return objectives


def _objective(entry: Any) -> Objective:
    if not isinstance(entry, Mapping) or not isinstance(entry.get("name"), str):
        raise ValueError(
            f"objectives: {entry!r} is no entry such as {{name: likelihood, weight: 1.0}}; the names are {', '.join(OBJECTIVES)}."
        )
    name = entry["name"]
    if name not in OBJECTIVES:
        raise ValueError(f"objectives: {name!r} is unknown{did_you_mean(name, list(OBJECTIVES))}")
    kind, settings = OBJECTIVES[name], {key: value for key, value in entry.items() if key != "name"}
    known = [field.name for field in fields(kind)]
    for key in settings:
        if key not in known:
            raise ValueError(f"objectives.{name}.{key}: unknown{did_you_mean(str(key), known)}")
    try:
        return cast(Objective, OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(kind), settings)))
    except OmegaConfBaseException as error:
        raise ValueError(f"objectives.{name}.{error.full_key}: {str(error).splitlines()[0]}") from error

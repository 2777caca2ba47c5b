"""Settings of a recipe: a dataclass filled from a YAML file and ``key=value`` overrides."""

import argparse
from collections.abc import Sequence
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

T = TypeVar("T")


def load_settings(kind: type[T], path: str | Path, overrides: Sequence[str] = ()) -> T:
    """Fill the dataclass ``kind``.

    Args:
        kind: dataclass whose fields are the known keys; a field that defaults to ``omegaconf.MISSING`` must be set.
        path: YAML file.
        overrides: ``key=value`` with dotted keys, such as ``optimizer.learning_rate=1e-3``; they win over the file.

    Raises:
        ValueError: for a missing file, an unknown key, a value of the wrong type or a field that is not set.
    """
    if not Path(path).is_file():
        raise ValueError(f"config: {str(path)!r} does not exist.")
    wrong = [override for override in overrides if "=" not in override]
    if wrong:
        raise ValueError(f"overrides: {wrong} are not of the form key=value.")
    try:
        layers = OmegaConf.structured(kind), OmegaConf.load(path), OmegaConf.from_dotlist(list(overrides))
        merged = OmegaConf.merge(*layers)
        missing = sorted(OmegaConf.missing_keys(merged))
        if missing:
            raise ValueError(f"config: {missing} must be set in {str(path)!r} or as key=value.")
        settings = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"config: {reason} (key {error.full_key!r} in {str(path)!r} or the overrides).") from error
    assert isinstance(settings, kind)  # to_object returns the structured type
    return settings


def dump_settings(settings: object) -> str:
    """Settings as YAML, every field spelled out."""
    return OmegaConf.to_yaml(OmegaConf.structured(settings))


def refuse_other(field: str, folder: Path, made_with: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Raises ValueError if what an earlier run left in ``folder`` was made with other settings, naming the differences."""
    different = [
        f"{name}: {made_with.get(name)!r} then, {value!r} now"
        for name, value in wanted.items()
        if made_with.get(name) != value
    ]
    if different:
        raise ValueError(
            f"{field}: {str(folder)!r} was made with other settings ({'; '.join(different)}); set them back, remove the folder, or "
            "choose another one."
        )


def _spelled_out(kind: Any) -> Any:
    """All keys with their defaults; a part that is off by default is shown with what it can be told, a list with one entry."""
    shown = OmegaConf.structured(kind)
    for name, hint in get_type_hints(kind).items():
        parts = [part for part in (hint, *get_args(hint)) if is_dataclass(part)]
        if parts:
            shown[name] = [_spelled_out(parts[0])] if get_origin(hint) is list else _spelled_out(parts[0])
    return shown


def parse_command_line(description: str | None, kind: type[T]) -> tuple[str, list[str]]:
    """Read ``--config FILE [key=value ...]``; ``--help`` lists every key with its default."""
    keys = OmegaConf.to_yaml(_spelled_out(kind))
    parser = argparse.ArgumentParser(
        description=description,
        epilog="keys and defaults ('???' must be set):\n\n" + keys,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", required=True, help="YAML file with the settings below")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that win over the file")
    args = parser.parse_args()
    return args.config, args.overrides

"""Settings of a recipe: a dataclass filled from a YAML file and ``key=value`` overrides."""

import argparse
import ast
import difflib
import inspect
import io
import re
import sys
import textwrap
import tokenize
from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass
from math import inf
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, GrammarParseError, OmegaConfBaseException
from yaml import YAMLError, safe_dump

from unified.registry import add_import_argument, import_extensions

T = TypeVar("T")


def load_settings(kind: type[T], path: str | Path, overrides: Sequence[str] = ()) -> T:
    """Fill the dataclass ``kind``.

    Args:
        kind: dataclass whose fields are the known keys; a field that defaults to ``omegaconf.MISSING`` must be set.
        path: YAML file.
        overrides: ``key=value`` with dotted keys, such as ``optimizer.learning_rate=1e-3``; they win over the file.

    Raises:
        ValueError: for a file that is missing or not YAML, an unknown key, a value of the wrong type, a key that is not set,
            or a value from an environment variable, which would be written beside the weights.
    """
    if not Path(path).is_file():
        raise ValueError(f"config: {str(path)!r} does not exist.")
    wrong = [override for override in overrides if "=" not in override]
    if wrong:
        raise ValueError(f"overrides: {wrong} are not of the form key=value.")
    try:
        file = OmegaConf.load(path)
        changes = OmegaConf.from_dotlist(list(overrides))
    except (YAMLError, OSError, UnicodeDecodeError, GrammarParseError) as error:
        raise ValueError(f"config: {str(path)!r} or an override is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(file, DictConfig):
        raise ValueError(f"config: {str(path)!r} holds a list; write it as lines of 'key: value'.")
    try:
        merged = OmegaConf.merge(OmegaConf.structured(kind), file, changes)
        missing = sorted(OmegaConf.missing_keys(merged))
        if missing:
            raise ValueError(f"config: {missing} must be set in {str(path)!r} or as key=value.")
        secret = [name for name, value in flat(OmegaConf.to_container(merged)) if "oc.env" in str(value)]
        if secret:
            raise ValueError(
                f"config: {secret} read environment variables, whose values would be written into config.yaml and the model "
                "card; write the value itself, or let the shell fill it in: key=$VARIABLE."
            )
        settings = OmegaConf.to_object(merged)
    except ConfigKeyError as error:
        known = [f.name for f in fields(error.object_type)] if is_dataclass(error.object_type) else []
        raise ValueError(f"config: {error.full_key!r} is unknown{did_you_mean(str(error.key), known)}") from error
    except (
        OmegaConfBaseException,
        TypeError,
    ) as error:  # TypeError: a list in place of names with values, or the reverse
        where = getattr(error, "full_key", None) or _misfit(kind, file, changes)
        raise ValueError(
            f"config: a value of {where!r} in {str(path)!r} or the overrides does not fit: {str(error).splitlines()[0]}"
        ) from error
    assert isinstance(settings, kind)  # to_object returns the structured type
    return settings


def _misfit(kind: Any, *given: DictConfig) -> str:
    """The first key whose value alone does not fit, for errors that name none."""
    for values in given:
        for name, value in flat(OmegaConf.to_container(values)):
            alone = OmegaConf.create()
            OmegaConf.update(alone, name, value)
            try:
                OmegaConf.merge(OmegaConf.structured(kind), alone)
            except (OmegaConfBaseException, TypeError):
                return name
    return ""


def dump_settings(settings: object) -> str:
    """Settings as YAML, with every field."""
    return OmegaConf.to_yaml(OmegaConf.structured(settings))


def flat(values: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested settings as pairs of a dotted name and a value, such as ``("optimizer.name", "adamw")``; lists stay whole."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def differences(before: dict[str, Any], now: dict[str, Any]) -> str:
    """What differs between two sets of settings, in one line; empty if nothing does."""
    names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    return "; ".join(f"{name}: {before.get(name)!r} then, {now.get(name)!r} now" for name in names)


def refuse_other(field: str, folder: Path, made_with: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Raises ValueError if an earlier run made what is in ``folder`` with other settings, naming the differences."""
    different = differences({name: made_with.get(name) for name in wanted}, wanted)
    if different:
        raise ValueError(
            f"{field}: {str(folder)!r} was made with other settings ({different}); set them back, remove the folder, or "
            "choose another one."
        )


def check_range(prefix: str, settings: object, interval: str, *names: str) -> None:
    """Raises ValueError unless the named fields lie in an interval. None is left alone; a list is checked item by item.

    Args:
        prefix: what stands before the names in the message, such as ``optimizer.``.
        settings: dataclass with the fields.
        interval: such as ``[0, 1)``, without the 1, or ``(0, inf)``; NaN lies in none.
        names: fields to check.
    """
    low, high = (float(bound) for bound in interval[1:-1].split(","))
    for name in names:
        value = getattr(settings, name)
        for number in value if isinstance(value, list) else [] if value is None else [value]:
            above = number > low if interval[0] == "(" else number >= low
            below = number < high if interval[-1] == ")" else number <= high
            if not (above and below):
                least = f"be {'above' if interval[0] == '(' else 'at least'} {low:g}"
                bounds = least if high == inf and number <= low else f"lie in {interval}"
                raise ValueError(f"{prefix}{name}: {value} must {bounds}.")


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Raises ValueError unless ``value`` is one of ``choices``."""
    if value not in choices:
        raise ValueError(f"{name}: {value!r} is unknown; use one of {', '.join(choices)}.")


def did_you_mean(name: str, known: Sequence[str]) -> str:
    """How an error about an unknown name ends: with a close one, or with all of them."""
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; use one of {', '.join(known)}."


def parse_command_line(
    description: str | None, kind: type[T], argv: Sequence[str] | None = None, configs: Path | None = None
) -> tuple[str, list[str]]:
    """Read ``--config FILE [key=value ...]``; ``--help`` lists every key with its default and its meaning.

    Args:
        description: what the command does.
        kind: dataclass of the keys.
        argv: the command line; None for that of the process.
        configs: folder of configs that come along, which ``--config`` takes by their names.
    """
    parser = argparse.ArgumentParser(
        description=description,
        epilog="keys and defaults ('???' must be set):\n\n" + "\n".join(described_keys(kind)),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names = [] if configs is None else sorted(file.stem for file in configs.glob("*.yaml"))
    known = f", or one of {', '.join(names)}" if names else ""
    parser.add_argument("--config", required=True, help=f"YAML file with the keys below{known}")
    add_import_argument(parser)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that win over the file")
    args = parser.parse_args(import_extensions(argv))
    return args.config if configs is None else find_config(args.config, configs), args.overrides


def overrides_first(argv: Sequence[str] | None) -> list[str]:
    """A command line with its ``key=value`` in front, where no option that takes a list, such as ``--seeds 0 1``, takes them."""
    given = sys.argv[1:] if argv is None else list(argv)
    overrides = [part for part in given if re.match(r"[\w.]+=", part)]
    return [*overrides, *(part for part in given if part not in overrides)]


def find_config(name: str, configs: Path) -> str:
    """The path of a config: a name without suffix and folders is one of those in ``configs``, anything else a path.

    Raises:
        ValueError: for a name that is neither in ``configs`` nor a file.
    """
    if Path(name).name != name or Path(name).suffix:
        return name
    file = configs / f"{name}.yaml"
    if file.is_file():
        return str(file)
    if not Path(name).is_file():
        known = sorted(file.stem for file in configs.glob("*.yaml"))
        raise ValueError(f"config: {name!r} is no file and no known name{did_you_mean(name, known)}")
    return name


def meanings(kind: type) -> dict[str, str]:
    """What the fields of a dataclass mean, by the comment behind or above each; fields without one are left out."""
    lines, _ = inspect.getsourcelines(kind)
    source = textwrap.dedent("".join(lines))
    comments = {
        token.start[0]: (token.string.lstrip("# "), token.line.lstrip().startswith("#"))
        for token in tokenize.generate_tokens(io.StringIO(source).readline) if token.type == tokenize.COMMENT
    }  # fmt: skip
    found: dict[str, str] = {}
    (body,) = ast.parse(source).body
    assert isinstance(body, ast.ClassDef)
    for node in body.body:
        if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name):
            continue
        behind = [comments[line][0] for line in range(node.lineno, (node.end_lineno or 0) + 1) if line in comments]
        above = comments.get(node.lineno - 1)
        if behind or (above and above[1]):
            found[node.target.id] = " ".join(behind) if behind else above[0]  # type: ignore[index]
    return found


def defaults_of(kind: Any) -> dict[str, Any]:
    """The default of every field, ``???`` where one must be set."""
    return {str(name): value for name, value in OmegaConf.to_container(OmegaConf.structured(kind)).items()}  # type: ignore


def described_keys(kind: Any, indent: str = "") -> Iterator[str]:
    """All keys as lines of YAML with defaults and meanings, also those of a part that is off by default.

    A list of parts is shown with one entry.
    """
    means, hints, shown = meanings(kind), get_type_hints(kind), defaults_of(kind)
    for field_ in fields(kind):
        name, hint = field_.name, hints[field_.name]
        meaning = f"  # {means[name]}" if name in means else ""
        parts = [part for part in (hint, *get_args(hint)) if is_dataclass(part)]
        if not parts:
            default = (
                "???"
                if shown[name] == "???"
                else safe_dump([shown[name]], default_flow_style=True, width=inf).strip()[1:-1]
            )
            yield f"{indent}{name}: {default}{meaning}"
            continue
        several = get_origin(hint) is list
        about = (parts[0].__doc__ or "").splitlines()[0]
        yield f"{indent}{name}:  # {means.get(name, about)}"
        for number, line in enumerate(described_keys(parts[0])):
            yield f"{indent}{('- ' if number == 0 else '  ') if several else '  '}{line}"

"""Custom image tokenizers, metrics and rewards, by name.

    unified evaluate --import my_metrics.py --metrics sharpness ...

A file or module that is named by ``--import``, or by the key ``imports`` of a training config, is run before anything
looks a name up; it calls :func:`register`. An extension is code: import only what you trust.
"""

import argparse
import importlib.util
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

METRICS: dict[str, Any] = {}  # instances of unified_eval.metrics.Metric
REWARDS: dict[str, Callable[..., Any]] = {}  # functions of images and captions that return a number for each


def register(name: str, *, tokenizer: Any = None, metric: Any = None, reward: Callable[..., Any] | None = None) -> None:
    """Make an image tokenizer, a metric or a reward known by a name.

    Args:
        name: of a tokenizer, the ``model_type`` in the ``config.json`` of its folders; else what options call it.
        tokenizer: a module that follows :class:`unified_tokenizers.ImageTokenizer`, with a class method
            ``from_pretrained(folder)``.
        metric: an instance of a class that follows :class:`unified_eval.metrics.Metric`.
        reward: a function ``(images, captions) -> numbers``, one for each image.

    Raises:
        ValueError: if the name is empty or taken, or what is registered lacks something.
    """
    given = {"tokenizer": tokenizer, "metric": metric, "reward": reward}
    if not isinstance(name, str) or not name.strip():
        raise ValueError(f"name: {name!r} is no name; give a text.")
    if all(value is None for value in given.values()):
        raise ValueError(f"register: nothing is given for {name!r}; give a tokenizer, a metric or a reward.")
    if tokenizer is not None:
        from unified_tokenizers.auto import register_tokenizer

        register_tokenizer(name, tokenizer)
    if metric is not None:
        if isinstance(metric, type) or not callable(getattr(metric, "add", None)) or not hasattr(metric, "needs"):
            raise ValueError(
                f"metric: {name!r} is {metric!r}, not an instance with needs and add; see unified_eval.Metric."
            )
        _add(METRICS, "metric", name, metric)
    if reward is not None:
        if not callable(reward):
            raise ValueError(f"reward: {name!r} is {reward!r}, which cannot be called; give a function.")
        _add(REWARDS, "reward", name, reward)


def _add(table: dict[str, Any], kind: str, name: str, value: Any) -> None:
    if name in table:
        raise ValueError(f"{kind}: {name!r} is taken; choose another name.")
    table[name] = value


def import_modules(names: Sequence[str], field: str = "import") -> None:
    """Run the user's modules, each once: files that end in ``.py``, or names as Python imports them.

    Raises:
        ValueError: naming the ``field``, if one does not exist or cannot be imported.
    """
    for name in names:
        try:
            if name.endswith(".py"):
                _run_file(Path(name).expanduser(), field)
                continue
            if os.getcwd() not in sys.path:
                sys.path.append(os.getcwd())  # as for `python -m`, but behind what is installed
            importlib.import_module(name)
        except ImportError as error:
            raise ValueError(f"{field}: {name!r} cannot be imported ({error}).") from error


def _run_file(path: Path, field: str) -> None:
    if not path.is_file():
        raise ValueError(f"{field}: {str(path)!r} does not exist.")
    name = f"unified_extension.{path.resolve()}"
    if name in sys.modules:
        return
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None  # of a .py file
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]  # it registered only a part
        raise


def add_import_argument(parser: Any) -> None:
    """Add ``--import`` to a parser, for its help; :func:`import_extensions` reads it."""
    parser.add_argument(
        "--import", dest="imports", action="append", default=argparse.SUPPRESS, metavar="MODULE",
        help="module, or file .py, that registers custom tokenizers, metrics or rewards; may be repeated",
    )  # fmt: skip


def import_extensions(argv: Sequence[str] | None = None) -> list[str]:
    """Import what ``--import`` names on a command line, and return the rest of it.

    Call it before a parser reads names that extensions add to. Raises ValueError as :func:`import_modules`.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    add_import_argument(parser)
    args, rest = parser.parse_known_args(sys.argv[1:] if argv is None else list(argv))
    import_modules(getattr(args, "imports", []))
    return rest

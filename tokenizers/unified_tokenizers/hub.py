"""Is a name a path on this machine or a repository on the Hub? One answer for everything that takes either."""

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from reprlib import repr as short
from typing import Any

_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_OUR_FOLDERS = ("runs", "data")  # where the recipes write
_FILES = (
    ".arrow", ".bin", ".ckpt", ".csv", ".gguf", ".json", ".jsonl", ".model", ".npz", ".parquet", ".pt", ".pth",
    ".safetensors", ".tar", ".txt", ".yaml", ".zip",
)  # fmt: skip


def expanded(name: str | Path) -> Path:
    """A path with ``~`` in front expanded, unless a file or folder here is called that."""
    path = Path(name)
    if path.exists():
        return path
    try:
        return path.expanduser()
    except RuntimeError:  # ~ and the name of nobody
        return path


def local_path(name: str | Path, field: str) -> Path | None:
    """The path that a name stands for, with ``~`` expanded; None for a name that only the Hub can know.

    What exists here is a path. So is what does not look like ``name`` or ``owner/name``, ends as a data file does, or lies
    in a folder that exists or that the recipes write to: ``runs/nope`` is never looked up on the Hub.

    Args:
        name: path or name of a repository.
        field: what it was given as, for errors.

    Raises:
        ValueError: if it is a path and does not exist.
    """
    if not isinstance(name, str | Path) or not str(name):
        raise ValueError(f"{field}: {name!r} is neither a path nor a name on the Hub.")
    try:
        path = expanded(name)
        if path.exists():
            return path
    except OSError as error:  # such as a name that is too long
        raise ValueError(f"{field}: {short(str(name))} cannot be a path ({error.strerror}).") from error
    text = str(name)
    owner, slash, _ = text.partition("/")
    inside = slash and (owner in _OUR_FOLDERS or Path(owner).is_dir())
    if isinstance(name, str) and _REPOSITORY.fullmatch(text) and not inside and path.suffix not in _FILES:
        return None
    raise ValueError(f"{field}: {text!r} does not exist on this machine; correct the path, or give a name on the Hub.")


def local_folder(
    name: str | Path,
    field: str = "folder",
    allow_patterns: Sequence[str] | None = None,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> Path:
    """A local folder as it is; a repository of the Hub is downloaded, or the files of it that match ``allow_patterns``.

    The other arguments are those of ``huggingface_hub.snapshot_download``; a local folder needs none of them.

    Raises:
        ValueError: as :func:`local_path`, or if the Hub does not have it either.
    """
    path = local_path(name, field)
    if path is not None:
        return path
    from huggingface_hub import snapshot_download

    given = {"revision": revision, "token": token, "cache_dir": cache_dir, "local_files_only": local_files_only or None}
    options: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    if allow_patterns is not None:
        options["allow_patterns"] = list(allow_patterns)
    with on_the_hub(name, field):
        return Path(snapshot_download(str(name), **options))


def check_config(folder: str | Path, field: str) -> None:
    """Refuse a local folder whose configuration is missing or cannot be read; transformers would take its defaults.

    Raises:
        ValueError: naming the file.
    """
    if not Path(folder).is_dir():
        return  # a name on the Hub
    if not (Path(folder) / "config.json").is_file():
        raise ValueError(f"{field}: {str(folder)!r} has no config.json; give a folder written by save_pretrained.")
    for file in (Path(folder) / name for name in ("config.json", "generation_config.json")):
        try:
            content = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{field}: {str(file)!r} is no JSON ({error}).") from error
        if not isinstance(content, dict):
            raise ValueError(f"{field}: {str(file)!r} holds a {type(content).__name__}; need names with values.")


@contextmanager
def on_the_hub(name: str | Path, field: str) -> Iterator[None]:
    """Turn what a failed look-up raises into one ValueError that says where the name was looked for.

    Errors over a folder that exists here pass unchanged.
    """
    try:
        yield
    except OSError as error:
        if expanded(name).exists():
            raise
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"{field}: {str(name)!r} is neither a path on this machine nor to be had from the Hub ({reason})."
        ) from error

"""One process at a time writes into a folder."""

import json
import os
import socket
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import IO

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LOCK_FILE = ".lock"


@contextmanager
def locked(folder: str | Path, field: str = "output_dir") -> Iterator[None]:
    """Keep ``folder`` for this process. With several processes in a run, the main one locks for all.

    ``.lock`` names the holder. The lock itself is the kernel's and ends with the process, however that ends: a file that
    a kill left behind is stale and holds nobody up. Forked workers do not inherit it. Where the file system has no locks,
    a warning says so.

    Args:
        folder: folder to keep; it is made if it does not exist.
        field: name of the setting that chose the folder, for the error.

    Raises:
        ValueError: if another process holds the folder, with its host, process id and start.
    """
    path = Path(folder) / LOCK_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    file = _lock(path, field)
    while not _is_at(file, path):  # the holder before let go of the file and removed it
        file.close()
        file = _lock(path, field)
    file.truncate(0)
    holder = {"host": socket.gethostname(), "pid": os.getpid(), "start": f"{datetime.now():%Y-%m-%d %H:%M:%S}"}
    file.write(json.dumps(holder))
    file.flush()
    try:
        yield
    finally:
        if _is_at(file, path):  # the folder may have been replaced
            path.unlink()
        file.close()


def _lock(path: Path, field: str) -> IO[str]:
    file = path.open("a+")
    try:
        if fcntl is not None:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:  # which of the two depends on the system
        file.seek(0)
        text = file.read()
        file.close()
        holder = "process {pid} on {host}, since {start}".format(**json.loads(text)) if text else "another process"
        raise ValueError(
            f"{field}: {str(path.parent)!r} is in use by {holder}; wait for its end, or choose another folder."
        ) from error
    except OSError as error:
        warnings.warn(
            f"{field}: {str(path.parent)!r} cannot be locked ({error}); use it in one run only.", stacklevel=4
        )
    return file


def _is_at(file: IO[str], path: Path) -> bool:
    return path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat())

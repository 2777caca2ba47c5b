"""A folder belongs to one process at a time."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from unified import locks
from unified.locks import LOCK_FILE, locked

# The module alone: what it needs of the package is nothing.
HOLD = f"""
import runpy, sys, time
locked = runpy.run_path({str(Path(__file__).parent.parent / "unified" / "locks.py")!r})["locked"]
try:
    with locked(sys.argv[1]):
        print("held", flush=True)
        sys.stdin.readline()
except ValueError as error:
    print(error, flush=True)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds ``tmp_path`` until it reads a line."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout.readline() == "held\n"
        yield child
        child.kill()


def test_another_process_is_named(holder, tmp_path):
    name = rf"process {holder.pid} on {socket.gethostname()}, since \d{{4}}-\d\d-\d\d"
    with pytest.raises(ValueError, match=f"out: .*{tmp_path.name}' is in use by {name}"), locked(tmp_path, "out"):
        pass
    holder.communicate("\n")
    assert not (tmp_path / LOCK_FILE).exists()
    with locked(tmp_path):
        assert json.loads((tmp_path / LOCK_FILE).read_text())["pid"] == os.getpid()
    assert list(tmp_path.iterdir()) == []


def test_the_lock_of_a_killed_process_is_stale(holder, tmp_path):
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert json.loads((tmp_path / LOCK_FILE).read_text())["pid"] == holder.pid
    with locked(tmp_path):
        assert json.loads((tmp_path / LOCK_FILE).read_text())["pid"] == os.getpid()


def test_a_folder_is_made_and_may_be_replaced(tmp_path):
    with locked(tmp_path / "new"):
        shutil.rmtree(tmp_path / "new")
        (tmp_path / "new").mkdir()
        (tmp_path / "new" / LOCK_FILE).write_text("of another process")
    assert (tmp_path / "new" / LOCK_FILE).read_text() == "of another process"


def test_a_lock_ends_with_an_error(tmp_path):
    with pytest.raises(KeyError), locked(tmp_path):
        raise KeyError
    child = subprocess.run([sys.executable, "-c", HOLD, tmp_path], input="\n", capture_output=True, text=True)
    assert child.stdout == "held\n"


def test_without_locks_of_the_file_system_a_warning_is_given(tmp_path, monkeypatch):
    def unsupported(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("unified.locks.fcntl.lockf", unsupported)
    with pytest.warns(UserWarning, match="cannot be locked .*; use it in one run only"), locked(tmp_path):
        pass


def test_a_file_that_its_holder_removed_meanwhile_is_no_lock(tmp_path, monkeypatch):
    """Opened before the holder let go of it: nobody else would see that lock."""
    lock, calls = locks._lock, []

    def removed_once(path, field):
        file = lock(path, field)
        if not calls:
            path.unlink()
        calls.append(1)
        return file

    monkeypatch.setattr(locks, "_lock", removed_once)
    with locked(tmp_path):
        assert len(calls) == 2 and (tmp_path / LOCK_FILE).is_file()

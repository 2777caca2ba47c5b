"""Processes that begin where the imports end: forks of one server that has made them, in place of a start of Python each.

Where starting is the subject, as of a launcher, tests start Python itself.
"""

import multiprocessing
import os
import runpy
import socket
import sys
from multiprocessing.connection import wait
from pathlib import Path
from subprocess import CompletedProcess
from tempfile import TemporaryDirectory

ROOT = Path(__file__).resolve().parent.parent
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["unified.training.loop", "torch._dynamo", "transformers.models.llama.modeling_llama"])


def python(script, *arguments, cwd=ROOT, **environment) -> CompletedProcess:
    """What ``python SCRIPT ...`` returns and prints, in the folder ``cwd`` and with more in its environment."""
    return _run_all([environment], script, arguments, cwd)


def torchrun(processes, script, *arguments, cwd=ROOT, **environment) -> CompletedProcess:
    """What ``torchrun --nproc_per_node PROCESSES SCRIPT ...`` does with CPU processes of one thread; a failure ends all."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    shared = {
        "WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
        "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", **environment,
    }  # fmt: skip
    ranks = [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]
    return _run_all(ranks, script, arguments, cwd)


def _run_all(environments, script, arguments, cwd) -> CompletedProcess:
    command = [str(script), *map(str, arguments)]
    with TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        for file in (out, err):
            file.touch()
        given = [(command, {**os.environ, **environment}, str(cwd), out, err) for environment in environments]
        started = [CONTEXT.Process(target=_run, args=arguments) for arguments in given]
        for process in started:
            process.start()
        try:
            while True:
                running = [process.sentinel for process in started if process.is_alive()]
                code = next((process.exitcode for process in started if process.exitcode), 0)
                if code or not running:
                    break
                wait(running)
        finally:  # also where a test is interrupted
            for process in started:
                process.kill()
                process.join()
        return CompletedProcess(command, code, out.read_text(), err.read_text())


def _run(command, environment, cwd, out, err) -> None:
    for number, file in ((1, out), (2, err)):
        os.dup2(os.open(file, os.O_WRONLY | os.O_APPEND), number)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    sys.argv = command
    sys.path.insert(0, str(Path(command[0]).resolve().parent))
    runpy.run_path(command[0], run_name="__main__")

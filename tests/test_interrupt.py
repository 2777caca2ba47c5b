"""SIGTERM and Ctrl-C between steps, on one process and on several."""

import os
import signal
import threading

import pytest
from accelerate import Accelerator
from forking import torchrun

from unified.training.interrupt import catch_signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_first_signal_is_noted_and_the_second_acts(number, capfd):
    seen = []
    before = signal.signal(number, lambda *_: seen.append(1))
    try:
        with catch_signals(Accelerator()) as stop:
            assert not stop()
            os.kill(os.getpid(), number)
            assert stop() and seen == []
            os.kill(os.getpid(), number)
            assert seen == [1]
        assert f"{signal.Signals(number).name}: the run stops after this step" in capfd.readouterr().err
    finally:
        signal.signal(number, before)


def test_handlers_are_put_back():
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with catch_signals(Accelerator()):
        assert signal.getsignal(signal.SIGTERM) not in before
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_other_threads_go_without():
    answers = []

    def work():
        with catch_signals(Accelerator()) as stop:
            answers.append(stop())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert answers == [False]


ONE_OF_TWO = """
import os, signal
from accelerate import Accelerator
from unified.training.interrupt import catch_signals

accelerator = Accelerator(cpu=True)
with catch_signals(accelerator) as stop:
    answers = [stop()]
    if accelerator.process_index == 1:
        os.kill(os.getpid(), signal.SIGTERM)
    answers.append(stop())
os.write(1, f"{accelerator.process_index} {answers}\\n".encode())  # at once: both write to one pipe
os._exit(0)
"""


@pytest.mark.process
def test_all_processes_stop_at_the_same_step(tmp_path):
    (tmp_path / "script.py").write_text(ONE_OF_TWO)
    done = torchrun(2, tmp_path / "script.py")
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == ["0 [False, True]", "1 [False, True]"]

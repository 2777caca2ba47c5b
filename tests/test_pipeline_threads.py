"""One pipeline used from several threads: every call samples what it samples alone, and stops nobody but itself."""

import threading
import time

import pytest
import torch
from conftest import generators
from PIL import Image

from unified.decoding.config import DECODING_MODES
from unified.prediction.plan import RASTER

CAPTIONS = ["red apple", "blue car", "a green tree", "yellow sun"]
WAIT = 30  # seconds, far more than anything here takes


@pytest.fixture
def slow(pipeline):
    """The pipeline with a pause in every pass, where another thread may come in."""
    for name, module in pipeline.model.named_modules():
        if name.endswith("rotary_emb.rotary"):
            module.register_forward_pre_hook(lambda *_: time.sleep(0.001))
    return pipeline


def in_threads(work, count=4):
    """Results of ``work(0)``, ``work(1)``, ..., each in its own thread."""
    results, errors = {}, []

    def run(index):
        try:
            results[index] = work(index)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(index,)) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT)
    assert not errors and len(results) == count, errors
    return [results[index] for index in range(count)]


@pytest.mark.process
@pytest.mark.parametrize("decoding", [name for name, mode in DECODING_MODES.items() if mode.suits(RASTER)])
def test_threads_sample_what_they_sample_alone(slow, decoding):
    def codes(index):
        options = {"decoding": decoding, "guidance_scale": 1.0 + index % 2, "generator": generators(index)}
        return [slow(CAPTIONS[index], output_type="codes", **options).codes for _ in range(2)]

    alone = [codes(index) for index in range(4)]
    for got, expected in zip(in_threads(codes), alone, strict=True):
        assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])


@pytest.mark.process
def test_threads_that_ask_for_different_things(slow, photo):
    """An edit, a stream, captions and a conversation at the same time."""
    mask = Image.new("L", (16, 16), 255)
    mask.paste(0, (0, 0, 16, 8))

    def ask(index):
        generator = generators(index)
        if index == 0:
            return slow.inpaint("red apple", photo, mask, generator=generator).codes.tolist()
        if index == 1:
            return [output.codes.tolist() for output in slow.stream("blue car", generator=generator, preview_every=1)]
        if index == 2:
            return slow.caption([photo, photo.rotate(90)], temperature=5.0, generator=generators(2, 3))
        return [
            part if isinstance(part, str) else part.tobytes() for part in slow.chat(["yellow sun"], generator=generator)
        ]

    alone = [ask(index) for index in range(4)]
    for _ in range(2):
        assert in_threads(ask) == alone


def test_other_calls_come_in_between_two_previews(pipeline):
    stream = pipeline.stream("red apple", generator=generators(0))
    first = next(stream)
    (codes,) = in_threads(lambda _: pipeline("blue car", generator=generators(1)).codes, 1)
    *_, last = stream
    assert (first.codes < 0).any() and torch.equal(codes, pipeline("blue car", generator=generators(1)).codes)
    assert torch.equal(last.codes, pipeline("red apple", generator=generators(0)).codes)


def test_an_interrupted_call_stops_no_other(slow):
    """Each thread's callback stops its own call after another number of codes, or not at all."""

    def sampled(index):
        def stop(pipe, step, timestep, tensors):
            if index and step == 3 * index:
                pipe.interrupt()

        output = slow(CAPTIONS[index], generator=generators(index), callback_on_step_end=stop)
        return int((output.codes >= 0).sum()), output.interrupted

    assert in_threads(sampled) == [(16, False), (4, True), (7, True), (10, True)]


def test_interrupt_between_previews_stops_that_stream(pipeline):
    other = pipeline.stream("blue car", generator=generators(1))
    stream = pipeline.stream("red apple", generator=generators(0))
    next(other), next(stream)
    pipeline.interrupt()
    (last,) = stream
    assert last.interrupted and int((last.codes >= 0).sum()) == 4
    *_, complete = other
    assert not complete.interrupted and torch.equal(complete.codes, pipeline("blue car", generator=generators(1)).codes)


def test_a_stream_that_is_given_up_leaves_nothing(pipeline):
    stream = pipeline.stream("red apple")
    next(stream)
    stream.close()
    assert pipeline._calls == []
    pipeline.interrupt()
    assert not pipeline("red apple").interrupted


def test_a_callback_may_sample(pipeline):
    """The lock is the thread's own; an interrupt of the inner call is not one of the outer call."""
    inner = []

    def callback(pipe, step, timestep, tensors):
        if step == 2:
            stop = lambda pipe, *step: pipe.interrupt()  # noqa: E731
            inner.append(pipe("blue car", generator=generators(1), callback_on_step_end=stop))

    outer = pipeline("red apple", generator=generators(0), callback_on_step_end=callback)
    assert inner[0].interrupted and int((inner[0].codes >= 0).sum()) == 1
    assert not outer.interrupted and torch.equal(outer.codes, pipeline("red apple", generator=generators(0)).codes)

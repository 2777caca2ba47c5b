"""The engine: callers share one batch, and each gets what the pipeline generates for it alone."""

import threading
import time
from concurrent.futures import CancelledError
from contextlib import closing
from dataclasses import replace

import pytest
import torch
from conftest import generators, noisy_adapter

from unified.pipeline.options import GenerationOptions
from unified.serving.engine import Engine

OPTIONS = GenerationOptions(guidance_scale=2.0, temperature=0.9)
WAIT = 30  # seconds, far more than anything here takes


def alone(pipe, prompt, *seeds, options=OPTIONS):
    """Codes of the pipeline by itself."""
    given = {**options.to_mapping(), "num_images_per_prompt": len(seeds)}
    return pipe(prompt, generator=generators(*seeds), output_type="codes", **given).codes


class Gate:
    """Lets an engine's batch go on step by step."""

    def __init__(self, engine):
        self.steps, self._step = threading.Semaphore(0), engine._batcher.step
        engine._batcher.step = self

    def __call__(self):
        assert self.steps.acquire(timeout=WAIT)
        return self._step()

    def open(self, steps=10_000):
        self.steps.release(steps)


def test_callers_from_threads_get_what_they_get_alone(pipeline):
    """Two threads with several jobs each, guided and not, more rows than the batch has; one job holds two images."""
    wanted = [
        ("red apple", (1,)),
        ("blue car", (2, 3)),
        ("yellow sun", (4,)),
        ("a green tree", (5,)),
        ("red apple", (6,)),
    ]
    plain = GenerationOptions(guidance_scale=1.0, temperature=0.9)
    expected = [alone(pipeline, p, *s, options=plain if i % 2 else OPTIONS) for i, (p, s) in enumerate(wanted)]
    results = {}
    with closing(Engine(pipeline, max_rows=3)) as engine:

        def call(first):
            jobs = {}
            for i in range(first, len(wanted), 2):
                prompt, seeds = wanted[i]
                options = replace(plain if i % 2 else OPTIONS, num_images_per_prompt=len(seeds))
                jobs[i] = engine.submit(prompt, options, generator=generators(*seeds))
            results.update({i: job.result(WAIT) for i, job in jobs.items()})

        threads = [threading.Thread(target=call, args=(first,)) for first in (0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(WAIT)
        assert sorted(engine._batcher.free) == [0, 1, 2]
    for i, codes in enumerate(expected):
        assert torch.equal(results[i].codes, codes)
    image = pipeline("yellow sun", guidance_scale=2.0, temperature=0.9, generator=generators(4)).images[0]
    assert results[2].images[0].tobytes() == image.tobytes()


def test_a_late_request_joins_the_running_batch(pipeline):
    expected = [alone(pipeline, "red apple", 1), alone(pipeline, "blue car", 2)]
    with closing(Engine(pipeline, max_rows=4)) as engine:
        gate = Gate(engine)
        first = engine.submit("red apple", OPTIONS, generator=generators(1))
        previews = first.previews()
        gate.open(4)  # one row of the 4x4 grid
        early = next(previews)
        assert (early.codes >= 0).sum() == 4 and torch.equal(early.codes[0, 0], expected[0][0, 0])
        assert set(early.images[0].crop((0, 4, 16, 16)).get_flattened_data()) == {(128, 128, 128)}
        second = engine.submit("blue car", OPTIONS, generator=generators(2))
        gate.open(8)
        assert (next(previews).codes >= 0).sum() >= 8
        assert (next(second.previews()).codes >= 0).sum() in (4, 8)  # while the first one is not done
        gate.open()
        assert torch.equal(second.result(WAIT).codes, expected[1])
        assert torch.equal(first.result(WAIT).codes, expected[0])
        assert torch.equal(list(previews)[-1].codes, expected[0])


def test_cancelling_frees_the_rows(pipeline):
    expected = alone(pipeline, "blue car", 2)
    with closing(Engine(pipeline, max_rows=2)) as engine:
        gate = Gate(engine)
        running = engine.submit("red apple", OPTIONS, generator=generators(1))
        gate.open(5)
        assert (next(running.previews()).codes >= 0).sum() == 4
        waiting = engine.submit("yellow sun", OPTIONS, generator=generators(3))
        last = engine.submit("blue car", OPTIONS, generator=generators(2))
        assert (waiting.ahead, last.ahead) == (0, 1)
        running.cancel()
        waiting.cancel()
        gate.open()
        for job in (running, waiting):
            with pytest.raises(CancelledError):
                job.result(WAIT)
        assert torch.equal(last.result(WAIT).codes, expected)
        assert sorted(engine._batcher.free) == [0, 1]
        last.cancel()  # too late to matter
        assert torch.equal(last.result(WAIT).codes, expected)


@pytest.mark.process
def test_an_adapter_has_the_batch_for_itself(pipeline, tmp_path, monkeypatch):
    """a, b, none, a: each job samples as alone with its adapter, jobs of one adapter share, switches happen only between."""
    for name, seed in (("a", 1), ("b", 2)):
        pipeline.model = noisy_adapter(pipeline.model, tmp_path / name, seed)
    expected = {None: alone(pipeline, "red apple", 1)}
    for name in "ab":
        pipeline.load_lora_weights(tmp_path / name, name)
        expected[name] = alone(pipeline, "red apple", 1)
    assert not torch.equal(expected["a"], expected["b"]) and not torch.equal(expected["a"], expected[None])
    with closing(Engine(pipeline, max_rows=8)) as engine:
        assert engine.adapters == ["a", "b"]
        switched, make = [], pipeline.decoder
        monkeypatch.setattr(pipeline, "decoder", lambda: switched.append(len(engine._running)) or make())
        gate = Gate(engine)
        order = ["a", "a", "b", None, None, "a"]
        jobs = [engine.submit("red apple", OPTIONS, adapter=name, generator=generators(1)) for name in order]
        gate.open()
        for name, job in zip(order, jobs, strict=True):
            assert torch.equal(job.result(WAIT).codes, expected[name])
        assert switched == [0, 0, 0, 0]  # four changes, none while something was running
        with pytest.raises(ValueError, match=r"adapter: 'c' is not loaded; loaded are \['a', 'b'\]"):
            engine.submit("red apple", OPTIONS, adapter="c")


def test_a_full_queue_is_refused(pipeline):
    with closing(Engine(pipeline, max_rows=2, waiting=2)) as engine:
        gate = Gate(engine)
        running = engine.submit("red apple", OPTIONS)
        gate.open(4)
        next(running.previews())
        jobs = [engine.submit("red apple", OPTIONS) for _ in range(2)]
        with pytest.raises(ValueError, match="queue: 2 requests are waiting, the limit is 2; try again later"):
            engine.submit("red apple", OPTIONS)
        jobs[0].cancel()
        jobs.append(engine.submit("red apple", OPTIONS))  # its place is free at once
        gate.open()
        jobs[2].result(WAIT)
    with pytest.raises(ValueError, match="engine: it is closed"):
        engine.submit("red apple", OPTIONS)


def test_work_alone_runs_between_batches(pipeline):
    expected = alone(pipeline, "red apple", 1)
    with closing(Engine(pipeline)) as engine:
        gate = Gate(engine)
        before = engine.submit("red apple", OPTIONS, generator=generators(1))
        work = engine.alone(lambda: [len(engine._running), threading.current_thread().name])
        after = engine.submit("red apple", OPTIONS, generator=generators(1))
        failing = engine.alone(lambda: iter([1 / 0]))
        gate.open()
        assert list(work.previews())[-1] == work.result(WAIT) == "unified-engine"
        with pytest.raises(ZeroDivisionError):
            failing.result(WAIT)
        for job in (before, after):
            assert torch.equal(job.result(WAIT).codes, expected)


def test_a_failing_batch_tells_its_callers_and_the_next_one_works(pipeline, monkeypatch):
    expected = alone(pipeline, "red apple", 1)
    with closing(Engine(pipeline)) as engine:
        logits = engine._batcher.decoder.image_logits
        monkeypatch.setattr(engine._batcher.decoder, "image_logits", lambda hidden: logits(hidden) * float("nan"))
        with pytest.raises(ValueError, match="logits: NaN"):
            engine.submit("red apple", OPTIONS).result(WAIT)
        monkeypatch.undo()
        assert torch.equal(engine.submit("red apple", OPTIONS, generator=generators(1)).result(WAIT).codes, expected)


def begun(batcher, request):
    """Whether a code of a request's image is sampled."""
    codes = batcher.partial(request)
    return codes is not None and bool((codes >= 0).any())


@pytest.mark.process
@pytest.mark.parametrize("own", [False, True])
def test_an_image_that_fails_leaves_the_others_alone(pipeline, own):
    """NaN in the rows of one job, with the others' options or its own; its rows generate the next images as ever."""
    expected = [alone(pipeline, "red apple", 1), alone(pipeline, "blue car", 2)]
    with closing(Engine(pipeline, max_rows=6)) as engine:
        gate, batcher = Gate(engine), engine._batcher
        first = engine.submit("red apple", OPTIONS, generator=generators(1))
        options = replace(OPTIONS, num_images_per_prompt=2, temperature=0.8 if own else 0.9)
        bad = engine.submit("yellow sun", options)
        gate.open(2)
        deadline = time.monotonic() + WAIT
        while not begun(batcher, bad.requests[0]) and time.monotonic() < deadline:
            time.sleep(0.01)
        (row,) = [row for row in batcher.rows if row.request is bad.requests[0]]
        with torch.inference_mode():
            batcher._cache.values[0][row.indices] = float("nan")
        gate.open()
        with pytest.raises(ValueError, match="logits: NaN"):
            bad.result(WAIT)
        assert torch.equal(first.result(WAIT).codes, expected[0])
        for job in [engine.submit("blue car", OPTIONS, generator=generators(2)) for _ in range(3)]:
            assert torch.equal(job.result(WAIT).codes, expected[1])
        assert engine._batcher is batcher and sorted(batcher.free) == list(range(6)) and not batcher.failed


def test_bad_requests_are_named(pipeline):
    with pytest.raises(ValueError, match="max_rows: 1 must be a whole number of at least 2"):
        Engine(pipeline, max_rows=1)
    with closing(Engine(pipeline, prompt_tokens=4)) as engine:
        with pytest.raises(ValueError, match="prompt: ' ' is not a caption"):
            engine.submit(" ", OPTIONS)
        long = "a cat and a dog and a green tree"
        with pytest.raises(ValueError, match=r"^prompt: \d+ tokens, at most 4 are taken here; shorten it"):
            engine.submit(long, OPTIONS)
        with pytest.raises(ValueError, match=r"^negative_prompt: \d+ tokens, at most 4 are taken here"):
            engine.submit("a", OPTIONS, negative_prompt=long)


def test_a_prompt_as_long_as_allowed_is_taken(pipeline):
    count = len(pipeline.text_tokenizer.encode("a cat and a dog"))
    with closing(Engine(pipeline, prompt_tokens=count)) as engine:
        job = engine.submit("a cat and a dog", OPTIONS, generator=generators(1))
        assert torch.equal(job.result(WAIT).codes, alone(pipeline, "a cat and a dog", 1))


def test_a_bad_schedule_is_refused_and_harms_nobody(pipeline):
    expected = alone(pipeline, "red apple", 1)
    with closing(Engine(pipeline)) as engine:
        gate = Gate(engine)
        job = engine.submit("red apple", OPTIONS, generator=generators(1))
        with pytest.raises(ValueError, match=r"guidance_schedule: falls to 0\.0"):
            engine.submit("blue car", GenerationOptions(guidance_schedule=lambda share: share))
        gate.open()
        assert torch.equal(job.result(WAIT).codes, expected)


def test_a_reader_without_patience_can_leave_a_waiting_job(pipeline):
    held = threading.Event()
    with closing(Engine(pipeline)) as engine:
        engine.alone(lambda: [held.wait(WAIT)])
        job = engine.submit("red apple", OPTIONS)
        previews = job.previews(patience=0.01)
        assert [next(previews), next(previews)] == [None, None]
        job.cancel()
        held.set()
        with pytest.raises(CancelledError):
            list(previews)


def test_closing_cancels(pipeline):
    engine = Engine(pipeline, max_rows=2)
    gate = Gate(engine)
    jobs = [engine.submit("red apple", OPTIONS) for _ in range(2)]
    gate.open(2)
    threading.Timer(0.1, gate.open).start()
    engine.close()
    for job in jobs:
        with pytest.raises(CancelledError):
            job.result(WAIT)

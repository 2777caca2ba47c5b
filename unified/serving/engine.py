"""Serving many callers with one model: their images are generated together, in one running batch.

transformers has continuous batching too (``generate_batch``). Its requests are independent rows of one vocabulary, which
images are not: a guided image is a pair of rows whose states become one prediction at every step; inside an image
span only codes are possible, embedded and scored by their own tables, while other rows of the batch may write text;
codes sit at 2D positions; and an image's noise belongs to its request, so that it is the same image in any company.
"""

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import CancelledError
from functools import partial
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from unified.decoding.batch_rows import Request
from unified.decoding.continuous_batching import Batcher
from unified.decoding.passes import image_columns
from unified.decoding.steering import check_steering
from unified.lora.base import base_of
from unified.pipeline.arguments import Wanted, arrange_batch, as_negatives, as_prompts, token_ids, trained_grids
from unified.pipeline.editing import unfinished_images
from unified.pipeline.options import GenerationOptions, check_whole
from unified.pipeline.pipeline import Classes, UnifiedPipeline, UnifiedPipelineOutput
from unified.sequence import ImageSegment
from unified_tokenizers.images import to_pil


class Job:
    """A request in an :class:`Engine`: watch it grow, wait for it, stop it; from any thread.

    Attributes:
        ahead: jobs that were waiting before it when it came.
        note: what holds it up, if anything does, in words.
    """

    def __init__(self, adapter: str | None, show: Callable[[Any], Any]):
        self.adapter, self.ahead, self.note, self.cancelled = adapter, 0, "", False
        self.work: Callable[[], Iterable[Any]] | None = None  # runs alone; or
        self.requests: list[Request] = []  # images for the batch
        self.codes = torch.empty(0, 0, 0, dtype=torch.int64)  # (N, h, w), -1 in images that are not complete
        self.complete = self.shown = 0  # complete images; codes in the last preview
        self._show, self._changed = show, threading.Condition()
        self._state: Any = None
        self._ended = False
        self._error: BaseException | None = None

    def previews(self, patience: float | None = None) -> Iterator[Any]:
        """The newest state each time that there is one, the complete result last; a slow reader skips states.

        Args:
            patience: seconds without a new state after which None is yielded, so that a reader can give up.

        Raises:
            CancelledError: after :meth:`cancel`.
            ValueError: the error of the work itself.
        """
        state, ended = None, False
        while not ended:
            with self._changed:
                news = self._changed.wait_for(partial(self._is_newer, state), patience)
                state, ended = self._state, self._ended
            if self._error is not None:
                raise self._error
            yield self._show(state) if news else None

    def _is_newer(self, seen: Any) -> bool:
        return self._state is not seen or self._ended

    def result(self, timeout: float | None = None) -> Any:
        """The complete result; raises as :meth:`previews`, and TimeoutError after ``timeout`` seconds."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._ended, timeout):
                raise TimeoutError(f"job: not finished after {timeout} seconds.")
        if self._error is not None:
            raise self._error
        return self._show(self._state)

    def cancel(self) -> None:
        """Stop it before its next code, or at the next item of work that runs alone; no effect once it has ended."""
        self.cancelled = True

    def update(self, state: Any, ended: bool = False, error: BaseException | None = None) -> None:
        """Set the newest state, and whether it is the last one; for the engine."""
        with self._changed:
            self._state, self._ended, self._error = state, ended or error is not None, error
            self._changed.notify_all()


class Engine:
    """One thread that owns a pipeline and generates images for many callers.

    Images join the running batch at any step and leave it when they are done; each is the one that the pipeline
    generates alone. Jobs begin in the order in which they came. An adapter belongs to the whole batch: a job with
    another one waits until the batch is empty, and so does work that runs alone.

    Args:
        pipe: the pipeline; it belongs to the engine until :meth:`close`.
        max_rows: rows of the batch; a guided image takes two.
        waiting: jobs that may wait to begin.
        prompt_tokens: tokens of the longest prompt that is taken; at least those of the pipeline's negative prompt.

    Raises:
        ValueError: if a number is too small, or the model does not say which grids it was trained on.
    """

    def __init__(self, pipe: UnifiedPipeline, max_rows: int = 8, waiting: int = 8, prompt_tokens: int = 128):
        check_whole("max_rows", max_rows, least=2)
        check_whole("waiting", waiting)
        check_whole("prompt_tokens", prompt_tokens)
        self.pipe, self.max_rows, self.limit, self.prompt_tokens = pipe, max_rows, waiting, prompt_tokens
        self.adapters: list[str] = list(pipe.model.peft_config) if isinstance(pipe.model, PeftModel) else []
        self._adapter: str | None = None
        if self.adapters:
            pipe.disable_lora()
        model, own = base_of(pipe.model), pipe.sampling.get("negative_prompt")
        if own:  # the pipeline's, which no caller can shorten
            grid = trained_grids(model.config)[0]
            self.prompt_tokens = max(prompt_tokens, len(token_ids(own, pipe.text_tokenizer, model.config, grid)))
        longest = max(image_columns(model, grid) for grid in trained_grids(model.config))
        self._length = self.prompt_tokens + longest + 2  # <bos> prompt <boi> codes <eoi> <eos>
        self._batcher = Batcher(pipe.decoder(), max_rows, self._length)
        self._waiting: deque[Job] = deque()
        self._running: list[Job] = []
        self._wake, self._closed = threading.Condition(), False
        self._showing = threading.Lock()  # callers' threads decode one after the other, beside the engine's own
        self._thread = threading.Thread(target=self._run, name="unified-engine", daemon=True)
        self._thread.start()

    def submit(
        self,
        prompt: str | Sequence[str] | None = None,
        options: GenerationOptions | None = None,
        adapter: str | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        generator: torch.Generator | int | Sequence[torch.Generator | int] | None = None,
        class_labels: Classes = None,
        negative_class_labels: Classes = None,
    ) -> Job:
        """Generate images; the job shows a :class:`UnifiedPipelineOutput` for every row of the grid.

        With plain decoding they join the batch; the other modes and images that adapters steer run alone.

        Args:
            prompt, negative_prompt, generator, class_labels, negative_class_labels: as for :class:`UnifiedPipeline`.
            options: how they are sampled; None, here and in a field, for the pipeline's defaults.
            adapter: name of the active adapter; None for the base model.

        Raises:
            ValueError: for arguments that the pipeline refuses, a long prompt, an unknown adapter, or a full queue.
        """
        options = (options or GenerationOptions()).filled(self.pipe.sampling)
        pipe, config = self.pipe, base_of(self.pipe.model).config
        wanted = Wanted(prompt, negative_prompt, class_labels, negative_class_labels).filled(pipe.sampling)
        count = wanted.count(config)
        if config.classes is None:
            self.check_length(as_prompts(prompt), "prompt")
            self.check_length(as_negatives(wanted.negative_prompt, count), "negative_prompt")
        tokenizer = pipe.text_tokenizer if config.classes is None else None
        batch = arrange_batch(config, tokenizer, pipe.image_tokenizer.downsample, wanted, options, generator)
        check_steering(pipe.model, options.steer or {})
        if options.decoding != "plain" or options.steer:
            given = {**vars(wanted), "generator": batch.generators, **options.to_mapping()}
            return self.alone(lambda: pipe.stream(**given), adapter)
        job = Job(adapter, self._images)
        for row, negative, each in zip(batch.rows, batch.negatives, batch.generators, strict=True):
            job.requests.append(Request(row, batch.grid, each, batch.sampling, negative=negative))
            self._batcher.check(job.requests[-1])
        job.codes = torch.full((len(job.requests), *batch.grid), -1)
        return self._queue(job)

    def check_length(self, texts: Iterable[str], name: str = "prompt") -> None:
        """Refuse texts with more tokens than are taken here. Raises ValueError, which calls them ``name``."""
        config = base_of(self.pipe.model).config
        for text in texts:
            count = len(token_ids(text, self.pipe.text_tokenizer, config, trained_grids(config)[0]))
            if count > self.prompt_tokens:
                raise ValueError(f"{name}: {count} tokens, at most {self.prompt_tokens} are taken here; shorten it.")

    def alone(self, work: Callable[[], Iterable[Any]], adapter: str | None = None) -> Job:
        """Run ``work`` on the engine's thread while nothing else is generated; its last item is the job's result.

        Raises:
            ValueError: for an unknown adapter or a full queue.
        """
        job = Job(adapter, lambda state: state)
        job.work = work
        return self._queue(job)

    def close(self) -> None:
        """Cancel everything and stop the thread."""
        with self._wake:
            self._closed = True
            self._wake.notify()
        self._thread.join()

    def _queue(self, job: Job) -> Job:
        if job.adapter is not None and job.adapter not in self.adapters:
            raise ValueError(f"adapter: {job.adapter!r} is not loaded; loaded are {self.adapters}.")
        with self._wake:
            job.ahead = sum(not each.cancelled for each in self._waiting)
            if self._closed:
                raise ValueError("engine: it is closed; make another one.")
            if job.ahead >= self.limit:
                raise ValueError(
                    f"queue: {job.ahead} requests are waiting, the limit is {self.limit}; try again later."
                )
            self._waiting.append(job)
            self._wake.notify()
        return job

    def _run(self) -> None:
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._closed or self._waiting or self._running)
                if self._closed:
                    break
            self._drop_cancelled()
            while (job := self._next()) is not None:
                self._begin(job)
            if self._running:
                self._step()
        for job in (*self._running, *self._waiting):
            job.update(None, error=CancelledError())

    def _drop_cancelled(self) -> None:
        with self._wake:
            dropped = [job for job in (*self._running, *self._waiting) if job.cancelled]
            for job in dropped:
                (self._running if job in self._running else self._waiting).remove(job)
        for job in dropped:
            for request in job.requests:
                self._batcher.cancel(request)
            job.update(None, error=CancelledError())

    def _next(self) -> Job | None:
        """The job that may begin now: the first one, if the batch has its adapter and a place for it, or is empty."""
        with self._wake:
            if not self._waiting or self._closed:
                return None
            job = self._waiting[0]
            shares = job.work is None and job.adapter == self._adapter and not self._batcher.waiting
            if self._running and not (shares and job.requests[0].rows <= len(self._batcher.free)):
                return None
            return self._waiting.popleft()

    def _begin(self, job: Job) -> None:
        try:
            self._switch(job.adapter)
            if job.work is None:
                for request in job.requests:
                    self._batcher.submit(request)
                self._running.append(job)
                return
            state = None
            for state in job.work():
                if job.cancelled or self._closed:
                    raise CancelledError
                job.update(state)
            job.update(state, ended=True)
        except Exception as error:  # the caller's, who gets it from the job
            job.update(None, error=error)

    def _switch(self, adapter: str | None) -> None:
        if adapter == self._adapter:
            return
        if adapter is None:
            self.pipe.disable_lora()
        else:
            self.pipe.set_adapters(adapter)
        self._batcher.decoder = self.pipe.decoder()
        self._adapter = adapter

    def _step(self) -> None:
        try:
            with self.pipe.lock:
                finished = dict(self._batcher.step())
        except Exception as error:  # the whole batch has failed: every job in it gets the error
            for job in self._running:
                job.update(None, error=error)
            self._running.clear()
            self._batcher = Batcher(self._batcher.decoder, self.max_rows, self._length)
            return
        for request, reason in self._batcher.failed.items():
            for job in [each for each in self._running if request in each.requests]:
                self._running.remove(job)
                for other in job.requests:
                    self._batcher.cancel(other)
                job.update(None, error=reason)
        self._batcher.failed.clear()
        for job in list(self._running):
            codes = [self._batcher.partial(request) for request in job.requests]
            for index, request in enumerate(job.requests):
                for segment in finished.get(request, ()):
                    if isinstance(segment, ImageSegment):
                        job.codes[index] = segment.codes
                        job.complete += 1
            sampled = job.complete * job.codes[0].numel() + sum(
                int((some >= 0).sum()) for some in codes if some is not None
            )
            if job.complete == len(codes):
                self._running.remove(job)
                job.update(job.codes, ended=True)
            elif sampled >= job.shown + job.codes.shape[2] * len(codes):  # another row of each image
                job.shown = sampled
                state = job.codes.clone()
                for image, some in zip(state, codes, strict=True):
                    if some is not None:
                        image.copy_(some)
                job.update(state)

    def _images(self, codes: Tensor) -> UnifiedPipelineOutput:
        with self._showing:
            return UnifiedPipelineOutput(to_pil(unfinished_images(self.pipe.image_tokenizer, codes)), codes)

"""What :class:`unified.serving.engine.Engine` is to a pipeline, for an engine behind a server: images of many callers."""

import logging
import threading
from collections import deque
from collections.abc import Iterable, Sequence
from concurrent.futures import CancelledError
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from unified.pipeline.options import GenerationOptions, check_whole
from unified.pipeline.pipeline import UnifiedPipelineOutput
from unified.serving.engine import Job
from unified.serving.remote import RemotePipeline


class Task(NamedTuple):
    """An image that a server shall be asked for."""

    job: Job
    number: int  # among the job's images
    body: dict[str, Any]


class RemoteEngine:
    """Threads that ask a server for the images of many callers, in the order in which they came.

    Each image is one request, at most ``pipe.concurrency`` at once; the server batches them. A job has a state for each image
    that is complete. One that is cancelled asks for no further image; what the server is at work on it completes for nobody.

    Args:
        pipe: what asks; it stays the caller's.
        waiting: jobs that may wait to be asked for.

    Attributes:
        guided: whether the server takes a guidance scale, found out by a request for one code.

    Raises:
        ValueError, ConnectionError, TimeoutError: as a call of the pipeline, if the server serves no such model.
    """

    def __init__(self, pipe: RemotePipeline, waiting: int = 8):
        check_whole("waiting", waiting)
        self.pipe, self.limit = pipe, waiting
        self.adapters: list[str] = []
        self._served = pipe.served()
        self.guided = self._takes_guidance()
        self._tasks: deque[Task] = deque()
        self._open: set[Job] = set()
        self._wake, self._closed = threading.Condition(), False
        self._showing = threading.Lock()  # callers' threads decode one after the other
        for _ in range(pipe.concurrency):
            threading.Thread(target=self._run, name="unified-remote-engine", daemon=True).start()

    def submit(
        self,
        prompt: str | Sequence[str],
        options: GenerationOptions | None = None,
        adapter: str | None = None,
        negative_prompt: str | None = None,
        *,
        generator: Sequence[torch.Generator],
    ) -> Job:
        """Queue images; returns at once. The job's states and result are a :class:`UnifiedPipelineOutput`, grey where an image
        is not complete.

        Args:
            prompt: one caption or several.
            options: how they are sampled; None, here and in a field, for the defaults of the export.
            adapter, negative_prompt: None; a server has none.
            generator: one for each image; its seed is sent.

        Raises:
            ValueError: for what a pipeline refuses too, what the server cannot do, or a full queue.
        """
        if adapter is not None or negative_prompt:
            name = "adapter" if negative_prompt is None else "negative_prompt"
            raise ValueError(f"{name}: the engine behind this page has none; leave it out.")
        given = (options or GenerationOptions()).filled(self.pipe.sampling)
        if given.sampling.guided and not self.guided:
            raise ValueError(
                f"guidance_scale: {given.sampling.guidance_scale:g}, the engine behind this page samples without guidance; give 1."
            )
        images = self.pipe.arrange(prompt, given)
        bodies = self.pipe.requests(images, given, 0, self._served, self.guided)
        for body, each in zip(bodies, generator, strict=True):
            body["seed"] = each.initial_seed()
        job = Job(None, lambda codes: self._images(codes, images.texts, given))
        job.codes = torch.full((len(bodies), *images.grid), -1)
        with self._wake:
            if self._closed:
                raise ValueError("engine: it is closed; make another one.")
            for task in [each for each in self._tasks if each.job.cancelled]:
                self._tasks.remove(task)
                self._end(task.job, CancelledError())
            job.ahead = len({id(each.job) for each in self._tasks})
            if job.ahead >= self.limit:
                raise ValueError(
                    f"queue: {job.ahead} requests are waiting, the limit is {self.limit}; try again later."
                )
            self._open.add(job)
            self._tasks.extend(Task(job, number, body) for number, body in enumerate(bodies))
            self._wake.notify_all()
        return job

    def check_length(self, texts: Iterable[str], name: str = "prompt") -> None:
        """Nothing: :meth:`submit` refuses what is too long."""

    def alone(self, work: Any, adapter: str | None = None) -> NoReturn:
        """Raises ValueError: what a pipeline can do beside images for prompts, no server can."""
        raise ValueError(
            "server: the engine behind this page generates images for prompts and nothing else; `unified serve` without "
            "--server changes images, describes them and talks."
        )

    def close(self) -> None:
        """Cancel everything; threads end with the requests that are under way."""
        with self._wake:
            self._closed = True
            self._tasks.clear()
            for job in list(self._open):
                self._end(job, CancelledError())
            self._wake.notify_all()

    def _takes_guidance(self) -> bool:
        """Ask for one code without guidance, and for one with it where that is refused. Raises ValueError if both are.

        In this order, since a server that checks no ids answers the second whatever it knows.
        """
        refusals = []
        for guided in (False, True):
            try:
                self.pipe.probe(self._served, guided)
                return guided
            except ValueError as error:
                refusals.append(str(error))
        raise ValueError(" And with guidance: ".join(refusals))

    def _run(self) -> None:
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._closed or self._tasks)
                if self._closed:
                    return
                job, number, body = self._tasks.popleft()
            self._ask(job, number, body)

    def _ask(self, job: Job, number: int, body: dict[str, Any]) -> None:
        def note(text: str) -> None:
            job.note = text

        try:
            codes = None if job.cancelled else torch.tensor(self.pipe.codes(body, note))
        except Exception as error:
            logging.getLogger(__name__).warning("%s", error)
            with self._wake:
                self._end(job, self._in_words(error))
            job.cancel()
            return
        with self._wake:
            if codes is None or job.cancelled:
                self._end(job, CancelledError())
            elif job in self._open:
                job.codes[number] = codes.view_as(job.codes[number])
                job.complete, job.note = job.complete + 1, ""
                ended = job.complete == len(job.codes)
                if ended:
                    self._open.remove(job)
                job.update(job.codes.clone(), ended)

    def _end(self, job: Job, error: BaseException) -> None:
        """End a job with an error unless it has ended; within the lock."""
        if job in self._open:
            self._open.remove(job)
            job.update(None, error=error)

    def _in_words(self, error: Exception) -> Exception:
        """An error as callers may read it, who need not know the server's address or what it says of itself."""
        if isinstance(error, TimeoutError):
            return ValueError(
                f"server: the engine did not answer in {self.pipe.timeout:g} seconds; ask for fewer images, or try again later."
            )
        if isinstance(error, ConnectionError):
            return ValueError("server: the engine cannot be reached; try again later.")
        if isinstance(error, ValueError):
            return ValueError(
                "server: the engine refuses the request or answers in a wrong way; the page's log says what."
            )
        return error

    def _images(self, codes: Tensor, texts: Sequence[str], options: GenerationOptions) -> UnifiedPipelineOutput:
        with self._showing:
            images = self.pipe.decode(codes)
        self.pipe.describe(images, texts, options)
        return UnifiedPipelineOutput(images, codes)

"""Dynamic batching: requests that arrive close together are answered in one batch, by one model thread.

Everything runs in the event loop's thread, except `Job.put`, `Job.end` and `Job.finish`, which the model thread calls.
"""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from avg_llava.inference.answers import Answer
from avg_llava.inference.generation import AnswerAbandoned
from avg_llava.inference.predictor import Predictor
from avg_llava.serving.limits import Limits
from avg_llava.serving.metrics import Metrics
from avg_llava.serving.prompts import PreparedRequest
from avg_llava.serving.protocol import ApiError

logger = logging.getLogger(__name__)

Event = list[int] | Answer | ApiError
"""New tokens; or, as the last event of a job, its answer or its error."""


class Job(BaseStreamer):
    """A prepared request in the batcher, and the queue of its events.

    Args:
        slot: From `Batcher.acquire_slot`.
        deadline: Time on the event loop's clock after which the job fails with `timeout_error`.

    Attributes:
        events: Tokens as they are generated, then an answer or an error.
        ended: True once the last event has been queued.
    """

    def __init__(self, prepared: PreparedRequest, slot: ExitStack, deadline: float, timeout_error: ApiError) -> None:
        self.prepared, self.slot = prepared, slot
        self.events: asyncio.Queue[Event] = asyncio.Queue()
        self.ended = self.has_tokens = False
        self.queued = time.monotonic()
        self._loop = asyncio.get_running_loop()
        self._timer = self._loop.call_at(deadline, self.fail, timeout_error)

    def put(self, value: Tensor) -> None:
        """Takes new tokens from the model thread.

        Raises:
            AnswerAbandoned: The job has ended, so that generation can stop.
        """
        if self.ended:
            raise AnswerAbandoned
        if value.numel():
            self.has_tokens = True
            self._loop.call_soon_threadsafe(self._add_event, value.tolist())

    def end(self) -> None:
        """Does nothing: `finish` ends the job."""

    def finish(self, answer: Answer) -> None:
        """Takes the answer from the model thread and ends the job."""
        self._loop.call_soon_threadsafe(self._add_event, answer)

    def fail(self, error: ApiError) -> None:
        """Ends the job with an error unless it has ended; its generation stops at the next token."""
        self._add_event(error)

    def _add_event(self, event: Event) -> None:
        if not self.ended:
            self.ended = not isinstance(event, list)
            if self.ended:
                self._timer.cancel()
            self.events.put_nowait(event)


class Batcher:
    """Queues jobs and answers them in batches; from here on, only the batcher's thread uses the predictor."""

    def __init__(self, predictor: Predictor, limits: Limits, metrics: Metrics) -> None:
        self._predictor, self._limits, self._metrics = predictor, limits, metrics
        self._waiting: deque[Job] = deque()
        self._has_jobs = asyncio.Event()
        self._running: list[Job] = []
        self._num_slots = 0
        metrics.queue_depth.set_function(lambda: self._num_slots)
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="model")

    def acquire_slot(self) -> ExitStack:
        """Reserves a slot in the bounded queue, from a request's arrival until the model takes it or it ends.

        Returns:
            The slot; `close` frees it, and has no effect after the first call.

        Raises:
            ApiError: The queue is full.
        """
        if self._num_slots >= self._limits.max_queue:
            raise ApiError(429, "queue_full", "the server's queue is full; retry later", {"Retry-After": "1"})
        self._num_slots += 1
        slot = ExitStack()
        slot.callback(self._release_slot)
        return slot

    def _release_slot(self) -> None:
        self._num_slots -= 1

    def submit(self, job: Job) -> None:
        """Appends a job to the queue."""
        self._waiting.append(job)
        self._has_jobs.set()

    def fail_all(self, error: ApiError) -> None:
        """Ends all waiting and running jobs with an error."""
        for job in [*self._waiting, *self._running]:
            job.fail(error)

    async def run(self) -> None:
        """Answers jobs until cancelled."""
        try:
            while True:
                self._running = await self._next_batch()
                if self._running:
                    self._metrics.batch_size.observe(len(self._running))
                    await self._run_batch(self._running)
                self._running = []
        finally:
            self._executor.shutdown(wait=False)

    async def _next_batch(self) -> list[Job]:
        """Waits for jobs and takes up to `max_batch` of them; jobs that have ended are dropped."""
        await self._has_jobs.wait()
        if len(self._waiting) < self._limits.max_batch:
            await asyncio.sleep(self._limits.batch_wait_ms / 1000)
        jobs: list[Job] = []
        while self._waiting and len(jobs) < self._limits.max_batch:
            job = self._waiting.popleft()
            job.slot.close()
            if not job.ended:
                jobs.append(job)
                self._metrics.queue_seconds.observe(time.monotonic() - job.queued)
        if not self._waiting:
            self._has_jobs.clear()
        return jobs

    async def _run_batch(self, jobs: Sequence[Job]) -> None:
        """Answers jobs in one batch. If that fails, jobs without a token so far are retried one by one."""
        future = asyncio.get_running_loop().run_in_executor(self._executor, self._generate, jobs)
        await asyncio.wait([future])
        error = future.exception()
        if error is None:
            return
        logger.error("a batch of %d requests failed", len(jobs), exc_info=error)
        for job in jobs:
            if len(jobs) > 1 and not job.has_tokens and not job.ended:
                await self._run_batch([job])
            else:
                job.fail(ApiError(500, "model_failed", "the model failed on this request; see the server's log"))

    def _generate(self, jobs: Sequence[Job]) -> None:
        """Answers jobs in the model thread."""
        predictor = self._predictor
        encoded = predictor.encode([job.prepared.request for job in jobs])
        choice = None
        if encoded.features is not None:
            choice = predictor.choose(encoded, [job.prepared.budget for job in jobs])
        decodings = [job.prepared.decoding for job in jobs]
        predictor.answer(encoded, choice, decodings, jobs, lambda row, answer: jobs[row].finish(answer))

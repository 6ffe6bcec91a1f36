"""The queue before the model: requests that come close together are answered together, by the one thread that owns it.

All but :meth:`Job.put`, :meth:`Job.end` and what they say is called in the event loop's thread.
"""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from avg_llava.inference.answers import Answer
from avg_llava.inference.generation import AnswerAbandoned
from avg_llava.inference.predictor import Predictor
from avg_llava.serving.limits import Limits
from avg_llava.serving.metrics import Metrics
from avg_llava.serving.prompts import Prepared
from avg_llava.serving.protocol import ApiError

logger = logging.getLogger(__name__)

Event = list[int] | Answer | ApiError
"""New tokens of an answer; its end; why there is none."""


class Place:
    """A request's place in the queue, from its arrival until the model takes it or it ends."""

    def __init__(self, batcher: "Batcher") -> None:
        self._batcher: Batcher | None = batcher

    def release(self) -> None:
        """Leaves the queue; again and again, if need be."""
        if self._batcher is not None:
            self._batcher.leave()
            self._batcher = None


class Job(BaseStreamer):
    """A request on its way: what it asks, and what happens to it.

    Args:
        prepared: What is asked.
        place: Its place in the queue.
        deadline: When it fails with `overdue`, on the event loop's clock.
        overdue: See there.

    Attributes:
        events: What happens: tokens, and at last an answer or an error.
        ended: Whether that last event has come.
        first_token: When the first token was there, on the clock of `time.monotonic`.
    """

    def __init__(self, prepared: Prepared, place: Place, deadline: float, overdue: ApiError) -> None:
        self.prepared, self.place = prepared, place
        self.events: asyncio.Queue[Event] = asyncio.Queue()
        self.ended = False
        self.first_token: float | None = None
        self.queued = time.monotonic()
        self._loop = asyncio.get_running_loop()
        self._timer = self._loop.call_at(deadline, self.fail, overdue)

    def put(self, value: Tensor) -> None:
        """Takes tokens from the model's thread.

        Raises:
            AnswerAbandoned: Nobody waits for them.
        """
        if self.ended:
            raise AnswerAbandoned
        if value.numel():
            self.first_token = self.first_token or time.monotonic()
            self._say(value.tolist())

    def end(self) -> None:
        """Nothing: the answer itself says that it has ended."""

    def answered(self, answer: Answer) -> None:
        """Takes the answer from the model's thread."""
        self._say(answer)

    def fail(self, error: ApiError) -> None:
        """Ends the job with an error, unless it has ended; the model stops at the next token."""
        self._happen(error)

    def _say(self, event: Event) -> None:
        self._loop.call_soon_threadsafe(self._happen, event)

    def _happen(self, event: Event) -> None:
        if not self.ended:
            self.ended = not isinstance(event, list)
            if self.ended:
                self._timer.cancel()
            self.events.put_nowait(event)


class Batcher:
    """Gathers jobs and has them answered.

    Args:
        predictor: Answers; from here on used by one thread only.
        limits: The server's limits.
        metrics: Counts.
    """

    def __init__(self, predictor: Predictor, limits: Limits, metrics: Metrics) -> None:
        self._predictor, self._limits, self._metrics = predictor, limits, metrics
        self._waiting: deque[Job] = deque()
        self._arrived = asyncio.Event()
        self._running: list[Job] = []
        self._num_places = 0
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="model")

    def enter(self) -> Place:
        """A place in the queue.

        Raises:
            ApiError: There is none.
        """
        if self._num_places >= self._limits.max_queue:
            raise ApiError(429, "queue_full", "the server has more to do than it can; try again", {"Retry-After": "1"})
        self._num_places += 1
        self._metrics.queue_depth.set(self._num_places)
        return Place(self)

    def leave(self) -> None:
        """Gives a place back; called by it."""
        self._num_places -= 1
        self._metrics.queue_depth.set(self._num_places)

    def submit(self, job: Job) -> None:
        """Puts a job into the queue."""
        self._waiting.append(job)
        self._arrived.set()

    def fail_all(self, error: ApiError) -> None:
        """Ends all jobs with an error."""
        for job in [*self._waiting, *self._running]:
            job.fail(error)

    async def run(self) -> None:
        """Answers jobs until it is cancelled."""
        try:
            while True:
                self._running = await self._gather()
                if self._running:
                    self._metrics.batch_size.observe(len(self._running))
                    await self._answer(self._running)
                self._running = []
        finally:
            self._thread.shutdown(wait=False)

    async def _gather(self) -> list[Job]:
        await self._arrived.wait()
        if len(self._waiting) < self._limits.max_batch:
            await asyncio.sleep(self._limits.batch_wait_ms / 1000)
        jobs: list[Job] = []
        while self._waiting and len(jobs) < self._limits.max_batch:
            job = self._waiting.popleft()
            job.place.release()
            if not job.ended:
                jobs.append(job)
                self._metrics.queue_seconds.observe(time.monotonic() - job.queued)
        if not self._waiting:
            self._arrived.clear()
        return jobs

    async def _answer(self, jobs: Sequence[Job]) -> None:
        """Has jobs answered. If the model fails, those of which nothing has been said are answered one by one."""
        future = asyncio.get_running_loop().run_in_executor(self._thread, self._predict, jobs)
        await asyncio.wait([future])
        error = future.exception()
        if error is None:
            return
        logger.error("a batch of %d requests failed", len(jobs), exc_info=error)
        for job in jobs:
            if len(jobs) > 1 and job.first_token is None and not job.ended:
                await self._answer([job])
            else:
                job.fail(ApiError(500, "model_failed", "the model failed at this request; the server's log says how"))

    def _predict(self, jobs: Sequence[Job]) -> None:
        """The model's thread."""
        predictor = self._predictor
        encoded = predictor.encode([job.prepared.request for job in jobs])
        choice = None
        if encoded.features is not None:
            choice = predictor.choose(encoded, [job.prepared.budget for job in jobs])
        decodings = [job.prepared.decoding for job in jobs]
        predictor.answer(encoded, choice, decodings, jobs, lambda row, answer: jobs[row].answered(answer))


__all__ = ["Batcher", "Event", "Job", "Place"]

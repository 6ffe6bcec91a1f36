"""What a server counts, for Prometheus. Labels are statuses and the model's levels, so that their number is bounded."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, PlatformCollector, ProcessCollector

from avg_llava.inference.answers import Answer

CLIENT_GONE = 499
"""Counted as the status of requests whose client left before the end."""
_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Metrics:
    """The metrics of one server.

    Attributes:
        registry: What `/metrics` shows.
    """

    def __init__(self) -> None:
        registry = self.registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        PlatformCollector(registry=registry)
        self.requests = Counter(
            "avg_llava_requests", "Chat requests that have ended, 499: client left", ["status"], registry=registry
        )
        self.queue_depth = Gauge(
            "avg_llava_queue_depth", "Requests that are being read or wait for the model", registry=registry
        )
        self.in_flight = Gauge("avg_llava_requests_in_flight", "Requests that have not ended", registry=registry)
        self.batch_size = Histogram(
            "avg_llava_batch_size", "Requests answered together", buckets=(1, 2, 4, 8, 16, 32, 64), registry=registry
        )
        self.request_seconds = Histogram(
            "avg_llava_request_seconds", "Seconds from arrival to the end", buckets=_SECONDS, registry=registry
        )
        self.first_token_seconds = Histogram(
            "avg_llava_first_token_seconds", "Seconds from arrival to the first token", buckets=_SECONDS,
            registry=registry,
        )  # fmt: skip
        self.queue_seconds = Histogram(
            "avg_llava_queue_seconds", "Seconds that prepared requests waited", buckets=_SECONDS, registry=registry
        )
        self.prompt_tokens = Counter("avg_llava_prompt_tokens", "Tokens read, visual ones included", registry=registry)
        self.visual_tokens = Counter("avg_llava_visual_tokens", "Visual tokens read", registry=registry)
        self.completion_tokens = Counter("avg_llava_completion_tokens", "Tokens written", registry=registry)
        self.images = Counter(
            "avg_llava_images", "Images answered about, by visual tokens per crop", ["granularity"], registry=registry
        )

    def count(self, answer: Answer) -> None:
        """Counts what an answer read and wrote."""
        self.prompt_tokens.inc(answer.num_prompt_tokens)
        self.visual_tokens.inc(answer.num_visual_tokens)
        self.completion_tokens.inc(answer.num_new_tokens)
        for level in answer.granularity:
            self.images.labels(level).inc()


__all__ = ["CLIENT_GONE", "Metrics"]

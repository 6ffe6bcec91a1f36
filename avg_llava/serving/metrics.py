"""Prometheus metrics of a server. Labels are status codes and granularities, so their cardinality is bounded."""

from functools import partial

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, PlatformCollector, ProcessCollector

from avg_llava.inference.answers import Answer

CLIENT_GONE = 499
"""Status counted for requests whose client disconnected before the response was complete."""
_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Metrics:
    """The metrics of one server, in a registry that `/metrics` exposes."""

    def __init__(self) -> None:
        registry = self.registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        PlatformCollector(registry=registry)
        self.requests = Counter(
            "avg_llava_requests", "Finished chat requests; 499: client disconnected", ["status"], registry=registry
        )
        self.queue_depth = Gauge(
            "avg_llava_queue_depth", "Requests being received or waiting for the model", registry=registry
        )
        self.in_flight = Gauge("avg_llava_requests_in_flight", "Unfinished chat requests", registry=registry)
        self.batch_size = Histogram(
            "avg_llava_batch_size", "Requests per batch", buckets=(1, 2, 4, 8, 16, 32, 64), registry=registry
        )
        seconds = partial(Histogram, buckets=_SECONDS, registry=registry)
        self.request_seconds = seconds("avg_llava_request_seconds", "Seconds from arrival to the end of the response")
        self.first_token_seconds = seconds("avg_llava_first_token_seconds", "Seconds from arrival to the first token")
        self.queue_seconds = seconds("avg_llava_queue_seconds", "Seconds a prepared request waits for the model")
        self.prompt_tokens = Counter(
            "avg_llava_prompt_tokens", "Prompt tokens, visual tokens included", registry=registry
        )
        self.visual_tokens = Counter("avg_llava_visual_tokens", "Visual tokens in prompts", registry=registry)
        self.completion_tokens = Counter("avg_llava_completion_tokens", "Generated tokens", registry=registry)
        self.images = Counter("avg_llava_images", "Images, by granularity", ["granularity"], registry=registry)

    def count(self, answer: Answer) -> None:
        """Adds the tokens and images of an answer."""
        self.prompt_tokens.inc(answer.num_prompt_tokens)
        self.visual_tokens.inc(answer.num_visual_tokens)
        self.completion_tokens.inc(answer.num_new_tokens)
        for level in answer.granularity:
            self.images.labels(level).inc()

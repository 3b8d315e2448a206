"""Prometheus metrics of a server."""

from __future__ import annotations

import time

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class Metrics:
    """The instruments of one server, in a registry of its own."""

    def __init__(self) -> None:
        registry = self.registry = CollectorRegistry()
        self.requests = Counter(
            "mapo_requests", "requests, by outcome", ["model", "outcome"], registry=registry
        )
        self.token_counts = Counter("mapo_tokens", "prompt, cached, completion", ["kind"], registry=registry)
        self.first = Histogram(
            "mapo_time_to_first_token_seconds", "from the request", registry=registry, buckets=_SECONDS
        )
        self.between = Histogram(
            "mapo_time_between_tokens_seconds", "mean of a block", registry=registry, buckets=_SECONDS
        )
        self.running = Gauge("mapo_slots_in_use", "replies that are being sampled", registry=registry)
        self.waiting = Gauge("mapo_queue", "replies that wait for a slot", registry=registry)

    def request(self, model: str, prompt_tokens: int) -> Watch:
        """Begins to watch a request."""
        self.token_counts.labels("prompt").inc(prompt_tokens)
        return Watch(self, model)


class Watch:
    """Times of one request."""

    def __init__(self, metrics: Metrics, model: str) -> None:
        self._metrics, self._model = metrics, model
        self._began = time.monotonic()
        self._seen: dict[int, tuple[int, float]] = {}  # by choice: tokens, when

    def tokens(self, choice: int, count: int) -> None:
        """A choice has `count` tokens now."""
        now = time.monotonic()
        before, then = self._seen.get(choice, (0, self._began))
        if count > before:
            self._metrics.token_counts.labels("completion").inc(count - before)
            if before:
                self._metrics.between.observe((now - then) / (count - before))
            else:
                self._metrics.first.observe(now - then)
        self._seen[choice] = (count, now)

    def usage(self, cached: int) -> None:
        """The prompt's tokens that were in the cache are known."""
        self._metrics.token_counts.labels("cached").inc(cached)

    def end(self, outcome: str) -> None:
        """The request has ended: ok, disconnected or error."""
        self._metrics.requests.labels(self._model, outcome).inc()

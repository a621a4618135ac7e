"""Counts of the service in Prometheus' format."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from stable_audio_lite.server.jobs import Jobs

_PREFIX = "stable_audio_lite_"


class Metrics(Collector):
    """Counts of answers, of a queue's jobs and of the process, read when they are asked for.

    Attributes:
        media_type: of `text`.
    """

    media_type = CONTENT_TYPE_LATEST

    def __init__(self, jobs: Jobs):
        """Count from now on."""
        self._jobs, self._registry = jobs, CollectorRegistry()
        labels = ("method", "route", "status")
        self._answers = Counter(f"{_PREFIX}answers", "Answers to requests.", labels, registry=self._registry)
        self._registry.register(self)
        ProcessCollector(registry=self._registry)

    def text(self) -> bytes:
        """All of them as they are now."""
        return generate_latest(self._registry)

    def count(self, method: str, route: str, status: int) -> None:
        """Count the answer to a request."""
        self._answers.labels(method, route, str(status)).inc()

    def collect(self) -> Iterator[Metric]:
        """Yield the figures of the queue."""
        totals, jobs = self._jobs.totals, self._jobs
        finished = CounterMetricFamily(f"{_PREFIX}jobs", "Jobs that have ended.", labels=["state"])
        for state in ("done", "failed", "cancelled"):
            finished.add_metric([state], totals.finished[state])
        yield finished
        for name, about, value in (
            ("refused_jobs", "Jobs that found the queue full.", totals.refused),
            ("batches", "Batches sampled.", totals.batches),
            ("sounds", "Sounds in batches.", totals.items),
            ("waited_seconds", "Time that jobs waited.", totals.waited),
            ("worked_seconds", "Time that the worker was busy.", totals.worked),
            ("sound_seconds", "Length of the sounds made.", totals.sound),
        ):
            yield CounterMetricFamily(_PREFIX + name, about, value)
        for name, about, value in (
            ("waiting_jobs", "Jobs that wait.", jobs.waiting),
            ("running_jobs", "Jobs that are being made.", jobs.running),
            ("kept_bytes", "Memory of results that are kept.", jobs.kept_bytes),
            ("loaded_models", "Models in memory.", len(jobs.store.loaded)),
        ):
            yield GaugeMetricFamily(_PREFIX + name, about, value)


class CountAnswers:
    """ASGI middleware that counts answers by method, route and status; all requests without a route as one."""

    def __init__(self, app: ASGIApp, metrics: Metrics):
        """Wrap an application."""
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on."""

        started = False

        def count(status: int) -> None:
            route = getattr(scope.get("route"), "path", None)
            self._metrics.count(scope["method"] if route else "any", route or "none", status)

        async def counted(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                count(message["status"])
            await send(message)

        try:
            await self._app(scope, receive, counted if scope["type"] == "http" else send)
        except Exception:
            if scope["type"] == "http" and not started:
                count(500)
            raise

"""Prometheus metrics, of one process or of several behind one port."""

import os

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
    multiprocess,
)

from dvit_infer.backends.captured import BUCKETS

SHARED = "PROMETHEUS_MULTIPROC_DIR"  # the folder in which processes share metrics; prometheus_client's variable
_SECONDS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)

disable_created_metrics()  # type: ignore[no-untyped-call]  # a time for every series, which nothing reads


class Metrics:
    """The metrics of a server."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self) -> None:
        self._registry = of = CollectorRegistry()
        labels = ["endpoint", "model"]
        self.requests = Counter("dvit_requests", "Requests answered", [*labels, "status"], registry=of)
        self.seconds = Histogram(
            "dvit_request_seconds", "From headers to answer", labels, buckets=_SECONDS, registry=of
        )
        self.images = Counter("dvit_images", "Images run; its rate is images/s", ["model"], registry=of)
        self.batch = Histogram("dvit_batch_images", "Images in a batch", ["model"], buckets=BUCKETS, registry=of)
        self.run = Histogram("dvit_batch_seconds", "A batch in the engine", ["model"], buckets=_SECONDS, registry=of)
        self.queue = Gauge("dvit_queue_images", "Images that wait", ["model"], multiprocess_mode="livesum", registry=of)
        if SHARED not in os.environ:
            ProcessCollector(registry=self._registry)  # memory, CPU time, open files

    def page(self) -> bytes:
        """Return the text of GET /metrics; with several processes, of all of them."""
        registry = self._registry
        if SHARED in os.environ:
            registry = CollectorRegistry()
            multiprocess.MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
        return generate_latest(registry)

    def answered(self, endpoint: str, model: str, status: int, seconds: float) -> None:
        self.requests.labels(endpoint, model, str(status)).inc()
        self.seconds.labels(endpoint, model).observe(seconds)


class ModelMeter:
    """The metrics of one model's batcher."""

    def __init__(self, metrics: Metrics, model: str) -> None:
        self._images, self._queue = metrics.images.labels(model), metrics.queue.labels(model)
        self._batch, self._run = metrics.batch.labels(model), metrics.run.labels(model)

    def queued(self, images: int) -> None:
        self._queue.set(images)

    def ran(self, images: int, seconds: float) -> None:
        self._images.inc(images)
        self._batch.observe(images)
        self._run.observe(seconds)

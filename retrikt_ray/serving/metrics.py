"""What a server counts, for Prometheus at GET /metrics: requests, time by phase, batches, versions, and how well what is asked is known.

Replicas on one machine count together: `retrikt serve` gives them a folder (RETRIKT_METRICS_DIR) in which each keeps its figures, and whichever
is asked answers for all. Without it, as on a cluster, a replica answers for itself.
"""

from __future__ import annotations

import os

FOLDER = "RETRIKT_METRICS_DIR"
if os.environ.get(FOLDER):  # before the import: it decides then how figures are kept
    os.environ["PROMETHEUS_MULTIPROC_DIR"] = os.environ[FOLDER]

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest  # noqa: E402
from prometheus_client.multiprocess import MultiProcessCollector  # noqa: E402

SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128)
UNKNOWN = 0.5  # cosine to the nearest row below which a text is like nothing in the store


class Metrics:
    """The figures of one replica."""

    def __init__(self) -> None:
        self.own = own = CollectorRegistry()
        self.requests = Counter("retrikt_requests_total", "Requests answered.", ["route", "status"], registry=own)
        self.seconds = Histogram(
            "retrikt_request_seconds", "From a request's head to its answer.", ["route"], buckets=SECONDS, registry=own
        )
        self.phases = Histogram(
            "retrikt_phase_seconds",
            "Time of a batch by phase: queue (of its oldest request), encode, dense, lexical, ngrams, mix, write.",
            ["phase"],
            buckets=SECONDS,
            registry=own,
        )
        self.batches = Histogram("retrikt_batch_requests", "Requests answered in one pass.", buckets=BATCHES, registry=own)
        self.texts = Counter("retrikt_texts_total", "Texts answered.", registry=own)
        self.unlike = Counter("retrikt_unlike_texts_total", f"Texts whose nearest row has a similarity below {UNKNOWN}.", registry=own)
        self.searched = Counter("retrikt_searched_texts_total", "Texts whose nearest rows were looked up.", registry=own)
        self.decided = Counter(
            "retrikt_decided_total", "Texts by the voice that decided: without it the label would be another one.", ["voice"], registry=own
        )
        self.edits = Counter("retrikt_edits_total", "Edits over HTTP.", ["kind"], registry=own)
        self.version = Gauge("retrikt_knowledge_version", "Version that was last answered from.", registry=own, multiprocess_mode="max")
        self.rows = Gauge("retrikt_knowledge_rows", "Rows of it.", registry=own, multiprocess_mode="mostrecent")

    def text(self) -> bytes:
        """In Prometheus's format."""
        if not os.environ.get(FOLDER):
            return generate_latest(self.own)
        every = CollectorRegistry()
        MultiProcessCollector(every, path=os.environ[FOLDER])
        return generate_latest(every)

"""What a server counts, for Prometheus at GET /metrics: requests, time by phase, batches, versions, and how well what is asked is known.

Replicas on one machine count together: `retrikt serve` gives them a folder (RETRIKT_METRICS_DIR) in which each keeps its figures, and whichever
is asked answers for all. Without it, as on a cluster, a replica answers for itself.
"""

from __future__ import annotations

import os
from typing import Any

FOLDER = "RETRIKT_METRICS_DIR"
if os.environ.get(FOLDER):  # before the import: it decides then how figures are kept
    os.environ["PROMETHEUS_MULTIPROC_DIR"] = os.environ[FOLDER]

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest  # noqa: E402
from prometheus_client.multiprocess import MultiProcessCollector  # noqa: E402

from retrikt_ray.serving.answering.job import UNKNOWN, Counted  # noqa: E402

SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128)
PHASES = ("queue", "tokenise", "student", "dense", "lexical", "ngrams", "mix", "write")


class Metrics:
    """The figures of one replica."""

    def __init__(self) -> None:
        self.own = own = CollectorRegistry()
        newest: Any = {"registry": own, "multiprocess_mode": "mostrecent"}  # replicas that have ended must not count for ever
        self.requests = Counter("retrikt_requests_total", "Requests answered.", ["route", "status"], registry=own)
        self.seconds = Histogram(
            "retrikt_request_seconds", "From a request's head to its answer.", ["route"], buckets=SECONDS, registry=own
        )
        self.phases = Histogram(
            "retrikt_phase_seconds",
            "Time of a batch by phase: queue (of its oldest request) and the rest.",
            ["phase"],
            buckets=SECONDS,
            registry=own,
        )
        self.phase = {name: self.phases.labels(name) for name in PHASES}  # looked up once
        self.batches = Histogram("retrikt_batch_requests", "Requests answered in one pass.", buckets=BATCHES, registry=own)
        self.texts = Counter("retrikt_texts_total", "Texts answered.", registry=own)
        self.unlike = Counter("retrikt_unlike_texts_total", f"Texts whose nearest row has a similarity below {UNKNOWN}.", registry=own)
        self.searched = Counter("retrikt_searched_texts_total", "Texts whose nearest rows were looked up.", registry=own)
        self.sampled = Counter(
            "retrikt_sampled_texts_total", "Texts of which it was counted which voice decided: a batch a second.", registry=own
        )
        self.decided = Counter(
            "retrikt_decided_total", "Sampled texts by each voice without which the label would be another one.", ["voice"], registry=own
        )
        self.edits = Counter("retrikt_edits_total", "Edits over HTTP.", ["kind"], registry=own)
        self.by_run = {
            "version": Gauge("retrikt_knowledge_version", "Version that was last answered from.", ["run"], **newest),
            "rows": Gauge("retrikt_knowledge_rows", "Rows of it.", ["run"], **newest),
            "refused": Gauge(
                "retrikt_swap_refused", "1 where the run that was last offered was refused: /info says why.", ["run"], **newest
            ),
        }
        self.of("")
        self.swaps = Counter(
            "retrikt_swaps_total", "Runs that were offered in place of the one that answers: taken, refused.", ["outcome"], registry=own
        )
        self.taken = Gauge("retrikt_release_taken_seconds", "When a release began to answer, in Unix time.", ["release"], **newest)

    def of(self, run: str) -> Metrics:
        """These figures, told of this run where they are of one; empty: the server's own."""
        self.version, self.rows, self.refused = (self.by_run[name].labels(run) for name in ("version", "rows", "refused"))
        return self

    def count(self, of: Counted) -> None:
        """A batch was answered."""
        self.batches.observe(of.requests)
        for phase, seconds in of.phases:
            self.phase[phase].observe(seconds)
        self.texts.inc(of.texts)
        self.version.set(of.version)
        self.rows.set(of.rows)
        if of.searched:
            self.searched.inc(of.searched)
            self.unlike.inc(of.unlike)
        if of.sampled:
            self.sampled.inc(of.sampled)
            for voice, texts in of.decided.items():
                self.decided.labels(voice).inc(texts)

    def swapped(self, release: str) -> None:
        """A run was taken over."""
        self.swaps.labels("taken").inc()
        self.refused.set(0)
        self.taken.labels(release).set_to_current_time()

    def swap_refused(self) -> None:
        self.swaps.labels("refused").inc()
        self.refused.set(1)

    def text(self) -> bytes:
        """In Prometheus's format."""
        if not os.environ.get(FOLDER):
            return generate_latest(self.own)
        every = CollectorRegistry()
        MultiProcessCollector(every, path=os.environ[FOLDER])
        return generate_latest(every)

"""A replica without a model."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import numpy as np

from making.tiny_run import LABELS
from retrikt_ray.serving.answering.job import Answers, Facts, Job, as_json
from retrikt_ray.serving.answering.opened import Opened
from retrikt_ray.serving.args import ServeArgs
from retrikt_ray.serving.metrics import Metrics
from retrikt_ray.serving.replica import Endpoint

ANSWER = [{"label": "positive", "score": 0.75}, {"label": "negative", "score": 0.25}]  # of a Stub to every text
LIMITS: dict[str, Any] = {"max_texts": 5, "max_text_chars": 200, "max_body_bytes": 4000}


class Stub(Endpoint):
    """A replica whose model says 0.25 and 0.75 to every text, and which finds what it was asked for."""

    def __init__(self, pair: bool = False, **args: Any) -> None:
        self.args, self.active = ServeArgs(run="x", **{"open": "write", **args}), 0
        self.metrics = Metrics()
        self.opened: Any = Opened.__new__(Opened)
        self.opened.predictor, self.process = SimpleNamespace(task=SimpleNamespace(labels=LABELS)), None
        self.opened.facts = Facts("0123456789ab", pair, "classification", "x", [])
        self.batcher: Any = SimpleNamespace(ask=self.told)
        self.seen: list[Any] = []  # texts that passed the checks
        self.open = asyncio.Event()
        self.open.set()

    async def told(self, job: Job) -> Answers:
        self.seen += job.texts
        await self.open.wait()
        answer = np.array([0.25, 0.75])
        return Answers([as_json(self.one(job, text, answer)) for text, _ in job.texts], "0123456789ab.7")

    def one(self, job: Job, text: str, answer: np.ndarray) -> Any:
        if job.kind == "retrieve":
            return [{"text": text, **job.asked.model_dump(exclude={"inputs", "truncate", "truncation_direction"})}]
        if job.kind == "embed":
            return [0.6, 0.8]
        scores = self.opened.scores(answer, *(job.asked or ()))
        return {"prediction": scores} if job.kind == "explain" else scores

    async def info(self) -> dict[str, Any]:
        return {"task": "stub"}

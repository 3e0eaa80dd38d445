"""A replica without a model."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import numpy as np

from making.tiny_run import LABELS
from retrikt_ray.serving.args import ServeArgs
from retrikt_ray.serving.replica import Endpoint

ANSWER = [{"label": "positive", "score": 0.75}, {"label": "negative", "score": 0.25}]  # of a Stub to every text
LIMITS: dict[str, Any] = {"max_texts": 5, "max_text_chars": 200, "max_body_bytes": 4000}


class Stub(Endpoint):
    """A replica whose model says 0.25 and 0.75 to every text, and which finds what it was asked for."""

    def __init__(self, pair: bool = False, **args: Any) -> None:
        self.args, self.active = ServeArgs(run="x", **args), 0
        self.predictor: Any = SimpleNamespace(task=SimpleNamespace(pair=pair, labels=LABELS))
        self.seen: list[Any] = []  # texts that passed the checks
        self.open = asyncio.Event()
        self.open.set()

    async def predict_batch(self, request: Any) -> list[Any]:
        texts, write = request
        self.seen += texts
        await self.open.wait()
        return write(SimpleNamespace(answers=np.array([[0.25, 0.75]] * len(texts))))

    async def retrieve_batch(self, request: Any) -> list[Any]:
        texts, asked = request
        self.seen += texts
        return [[{"text": text, **asked.model_dump(exclude={"inputs"})}] for text, _ in texts]

    def explanations(self, part: Any) -> list[Any]:
        return [{"prediction": self.scores(answer)} for answer in part.answers]

    async def info(self) -> dict[str, Any]:
        return {"task": "stub"}

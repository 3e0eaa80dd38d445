"""One replica: the routes over a Predictor, and the thread that it answers in.

A replica is ingress and student at once: FastAPI reads and checks requests (`wire.py`), `@serve.batch` gathers the texts of concurrent
ones, and one thread runs student and index over the batch. One process and no hop was the fastest of the layouts that were measured, and
one thread keeps the event loop free, also where Serve's throughput mode shares it with user code.

What was left out on purpose: Swagger's page under /docs, which loads its scripts from a CDN; /openapi.json describes the same API.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from importlib.resources import files
from typing import Any

import numpy as np
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from ray import serve
from starlette.exceptions import HTTPException
from starlette.responses import HTMLResponse, JSONResponse

from retrikt_ray import __version__
from retrikt_ray.knowledge.view import Neighbour
from retrikt_ray.predictor import Prediction, Predictor
from retrikt_ray.runtime.settings import ConfigError
from retrikt_ray.serving.actors import ActorSearcher
from retrikt_ray.serving.args import ServeArgs
from retrikt_ray.serving.wire import Body, Guard, PredictBody, Problem, Refusal, RetrieveBody, refuse, refuse_body, texts_of_inputs
from retrikt_ray.task.texts import Text

PAGE_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'"
EVIDENCE = ("id", "text", "text_pair", "source", "label", "score")  # of a row that was found, beside what it was found by


class Endpoint:
    """One replica: a Predictor, the thread it works in, and the routes."""

    def __init__(self, args: dict[str, Any]) -> None:
        self.args = ServeArgs(**args)
        self.active = 0
        # Thread counts of OpenMP belong to a thread, and fast tokenizers are not for two threads at once: one thread opens and answers.
        self.worker = ThreadPoolExecutor(1, "predictor")
        self.predictor = self.worker.submit(open_predictor, self.args).result()
        batched: Any  # Serve's own type hides its setters
        for batched in (self.predict_batch, self.retrieve_batch):
            batched.set_max_batch_size(self.args.max_batch)
            batched.set_batch_wait_timeout_s(self.args.batch_wait_ms / 1000)

    def __serve_build_asgi_app__(self) -> FastAPI:
        return build_api(self)

    @serve.batch
    async def predict_batch(self, requests: list[tuple[list[Text], Callable[[Prediction], Any]]]) -> list[Any]:
        """Answer several requests, each (texts, how to write its part of the prediction), in one pass."""

        def work() -> list[Any]:
            self.predictor.knowledge.refresh()
            evidence = any(write == self.explanations for _, write in requests)
            every = self.predictor.answer([t for texts, _ in requests for t in texts], evidence)
            edges = np.cumsum([0, *(len(texts) for texts, _ in requests)]).tolist()
            return [write(every.part(low, high)) for (_, write), low, high in zip(requests, edges, edges[1:], strict=False)]

        return await asyncio.get_running_loop().run_in_executor(self.worker, work)

    @serve.batch
    async def retrieve_batch(self, requests: list[tuple[list[Text], RetrieveBody]]) -> list[Any]:
        """Rows for several requests, those that ask alike in one pass. A bad filter is the answer of its own request, not of the batch."""

        def work() -> list[Any]:
            self.predictor.knowledge.refresh()
            alike: dict[Any, list[int]] = {}
            for i, (_, asked) in enumerate(requests):
                alike.setdefault((asked.mode, asked.k, asked.label, asked.source), []).append(i)
            answers: list[Any] = [None] * len(requests)
            for members in alike.values():
                found = self.retrieved([t for i in members for t in requests[i][0]], requests[members[0]][1])
                rest = iter([] if isinstance(found, Refusal) else found)
                for i in members:
                    answers[i] = found if isinstance(found, Refusal) else [next(rest) for _ in requests[i][0]]
            return answers

        return await asyncio.get_running_loop().run_in_executor(self.worker, work)

    def retrieved(self, texts: list[Text], asked: RetrieveBody) -> Any:
        """Per text: its nearest rows; those that share most words; or, hybrid, both apart."""
        where, view = {"label": asked.label, "source": asked.source}, self.predictor.knowledge.view
        sides: dict[str, list[Any]] = {}
        try:
            if asked.mode != "lexical":
                sides["dense"] = records(view.neighbours(self.predictor.retrieve(texts, asked.k, **where), "similarity"))
            if asked.mode != "dense":
                sides["lexical"] = records(view.neighbours(view.search_words(texts, asked.k, **where), "bm25"))
        except ConfigError as error:
            return Refusal(422, str(error), "a label of the task, a source of the store")
        if asked.mode != "hybrid":
            return sides[asked.mode]
        return [{side: rows[i] for side, rows in sides.items()} for i in range(len(texts))]

    async def answer(self, batched: Callable[[Any], Any], inputs: Any, asked: Any) -> JSONResponse:
        """Check the texts, wait for a batch, and answer one text by one object and a list by a list."""
        texts = texts_of_inputs(inputs, self.predictor.task.pair, self.args)
        if self.active >= self.args.capacity:
            raise Refusal(503, f"{self.active} requests are waiting already", "the same request a second later", {"Retry-After": "1"})
        self.active += 1
        try:
            answers = await batched((texts, asked))
        finally:
            self.active -= 1
        if isinstance(answers, Refusal):
            raise answers
        return JSONResponse(answers if isinstance(inputs, list) else answers[0])

    async def info(self) -> dict[str, Any]:
        """What is served, with the edits that the next request would see."""

        def work() -> dict[str, Any]:
            self.predictor.knowledge.refresh()
            return self.predictor.info()

        return await asyncio.get_running_loop().run_in_executor(self.worker, work)

    def scores(self, answer: np.ndarray) -> list[dict[str, Any]]:
        """Labels and scores of one answer (C,), best first; a regression's value is the score of LABEL_0, as Hugging Face has it."""
        if len(answer) == 1:
            return [{"label": "LABEL_0", "score": float(answer[0])}]
        return [{"label": self.predictor.task.labels[i], "score": float(answer[i])} for i in np.argsort(-answer, kind="stable")]

    def explanations(self, part: Prediction) -> list[dict[str, Any]]:
        """Per text: the answer, the student's own, what else spoke, the rows and n-grams it rests on, and the weights."""
        near, words, ngrams = records(part.neighbours), records(part.lexical_neighbours), part.ngrams
        return [
            {
                "prediction": self.scores(part.answers[i]),
                "student": self.scores(part.student[i]),
                "votes": {name: self.scores(vote[i]) if found[i] else None for name, (vote, found) in part.voices.items()},
                "neighbours": near[i],
                "lexical_neighbours": words[i],
                "ngrams": [asdict(spoken) for spoken in ngrams[i]],
                "mixture": asdict(self.predictor.mixture),
            }
            for i in range(len(part.answers))
        ]


def records(found: list[list[Neighbour]]) -> list[list[dict[str, Any]]]:
    """Rows that were found, as JSON has them."""
    return [
        [
            {key: getattr(n, key) for key in EVIDENCE}
            | {by: v for by, v in (("similarity", n.similarity), ("bm25", n.bm25)) if v is not None}
            for n in rows
        ]
        for rows in found
    ]


def open_predictor(args: ServeArgs) -> Predictor:
    """Open the run in the thread that will answer."""
    import torch

    torch.set_num_threads(args.threads)
    if not args.shard_actors:
        return Predictor.open(args.run, args.threads)
    return Predictor.open(args.run, args.threads, opener=lambda index, threads: ActorSearcher(index, args.shard_actors, threads))


def build_api(endpoint: Endpoint) -> FastAPI:
    """The routes over one replica."""
    api = FastAPI(title="retrikt", version=__version__, docs_url=None, redoc_url=None, redirect_slashes=False)
    api.add_middleware(Guard, max_body_bytes=endpoint.args.max_body_bytes)
    api.add_exception_handler(HTTPException, refuse)
    api.add_exception_handler(RequestValidationError, refuse_body)
    problems: dict[int | str, dict[str, Any]] = {code: {"model": Problem} for code in (400, 413, 415, 422, 500, 503)}
    page = (files("retrikt_ray.serving") / "page.html").read_text(encoding="utf-8")

    @api.post("/predict", responses=problems)
    async def predict(body: PredictBody) -> Any:
        """Labels and scores per text, best first."""
        return await endpoint.answer(
            endpoint.predict_batch, body.inputs, lambda part: [endpoint.scores(a)[: body.top_k] for a in part.answers]
        )

    @api.post("/retrieve", responses=problems)
    async def retrieve(body: RetrieveBody) -> Any:
        """Rows of the store per text: the nearest, those that share most words, or both."""
        return await endpoint.answer(endpoint.retrieve_batch, body.inputs, body)

    @api.post("/explain", responses=problems)
    async def explained(body: Body) -> Any:
        """The prediction, the student's own answer, the rows that voted, and how."""
        return await endpoint.answer(endpoint.predict_batch, body.inputs, endpoint.explanations)

    @api.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @api.get("/info")
    async def info() -> dict[str, Any]:
        limits = {key: getattr(endpoint.args, key) for key in ("max_texts", "max_text_chars", "max_body_bytes")}
        return await endpoint.info() | {"version": __version__, "limits": limits}

    @api.get("/", include_in_schema=False)
    async def front() -> HTMLResponse:
        return HTMLResponse(page, headers={"Content-Security-Policy": PAGE_POLICY})

    return api

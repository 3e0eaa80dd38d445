"""Serving a run over HTTP on Ray Serve.

Each replica is ingress and student at once: FastAPI reads and checks requests (`api.py`), `@serve.batch` gathers the texts of concurrent
ones, and one thread runs student and index over the batch. One process and no hop was the fastest of the layouts that were measured, and
one thread keeps the event loop free, also where Serve's throughput mode shares it with user code.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import os
import signal
import socket
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import Field, ValidationError
from ray import serve
from starlette.responses import JSONResponse

from retrikt_ray.index.actors import ActorSearcher
from retrikt_ray.knowledge.knowledge import Hits
from retrikt_ray.predictor import Prediction, Predictor, Votes, cast
from retrikt_ray.runtime.folders import Folder
from retrikt_ray.runtime.settings import ConfigError, Section, explain
from retrikt_ray.serving.wire import Refusal, RetrieveBody, build_api, read_texts

if TYPE_CHECKING:
    from fastapi import FastAPI

    from retrikt_ray.teacher.annotator import Text

APP = "retrikt"


class ServeArgs(Section):
    """What `retrikt serve`, or the `args` of a Serve config, can say."""

    run: str = Field(description="Run directory or its URI; on a cluster an absolute path or URI that every node can read.")
    replicas: int = Field(
        1, ge=1, description="Replicas, each with its own student; the index is memory-mapped, or, if IVF of up to 1 GB, held by each."
    )
    threads: int = Field(1, ge=1, description="CPUs a replica reserves, and its torch and FAISS threads.")
    shard_actors: int = Field(
        0, ge=0, description="Ray actors of `threads` CPUs, beside each replica, that hold the shards. 0: the replica maps them all itself."
    )
    max_batch: int = Field(64, ge=1, description="Requests answered together at most.")
    batch_wait_ms: float = Field(5, ge=0, description="How long a request waits for others to be answered with.")
    max_texts: int = Field(256, ge=1, description="Texts in one request; more are refused with 413.")
    max_text_chars: int = Field(20_000, ge=1, description="Characters of one text; longer ones are refused with 413.")
    max_body_bytes: int = Field(
        4_000_000, ge=1, description="Bytes of a request body; a larger one is refused with 413 before it is parsed."
    )
    max_queued: int = Field(
        200, ge=0, description="Requests that wait in a replica beside two full batches; further ones get 503 with Retry-After."
    )


def parse_args(args: dict[str, Any]) -> ServeArgs:
    """Raises ConfigError that names the unknown or wrong key."""
    try:
        return ServeArgs.model_validate(args)
    except ValidationError as error:
        raise explain(error, ServeArgs, "args of the Serve app") from None


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
            every = self.predictor.predict([t for texts, _ in requests for t in texts], evidence)
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
        where = {"label": asked.label, "source": asked.source}
        sides: dict[str, list[Any]] = {}
        try:
            if asked.mode != "lexical":
                sides["dense"] = self.neighbours(self.predictor.retrieve(texts, asked.k, **where), "similarity")
            if asked.mode != "dense":
                sides["lexical"] = self.neighbours(self.predictor.knowledge.search_words(texts, asked.k, **where), "bm25")
        except ConfigError as error:
            return Refusal(422, str(error), "a label of the task, a source of the store")
        if asked.mode != "hybrid":
            return sides[asked.mode]
        return [{side: rows[i] for side, rows in sides.items()} for i in range(len(texts))]

    async def answer(self, batched: Callable[[Any], Any], inputs: Any, asked: Any) -> JSONResponse:
        """Check the texts, wait for a batch, and answer one text by one object and a list by a list."""
        texts = read_texts(inputs, self.predictor.task["pair"], self.args)
        if self.active >= capacity(self.args):
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
        return [{"label": self.predictor.task["labels"][i], "score": float(answer[i])} for i in np.argsort(-answer, kind="stable")]

    def neighbours(self, hits: Hits, score: str) -> list[list[dict[str, Any]]]:
        """Per query, the rows of the store that it found, best first."""
        keys = ("id", "text", "text_pair", "source", "label", "score", score)
        width = hits.positions.shape[1]
        found = [self.predictor.neighbours(hits, i, width, score) for i in range(len(hits.positions))]
        return [[{key: row[key] for key in keys} for row in rows] for rows in found]

    def explanations(self, part: Prediction) -> list[dict[str, Any]]:
        """Per text: the answer, the student's own, the rows on both sides with their votes, and the weights."""
        mixture = self.predictor.mixture
        assert part.dense is not None and part.lexical is not None
        sides = (("dense", part.dense, mixture.k, mixture.tau), ("lexical", part.lexical, mixture.lexical_k, mixture.lexical_tau))
        told = {name: cast(Votes(h.scores, h.labels), k, tau) for name, h, k, tau in sides}
        near, words = self.neighbours(part.dense, "similarity"), self.neighbours(part.lexical, "bm25")
        return [
            {
                "prediction": self.scores(part.answers[i]),
                "student": self.scores(part.student[i]),
                "votes": {name: self.scores(vote[i]) if there[i] else None for name, (vote, there) in told.items()},
                "neighbours": near[i],
                "lexical_neighbours": words[i],
                "mixture": asdict(mixture),
            }
            for i in range(len(part.answers))
        ]


def open_predictor(args: ServeArgs) -> Predictor:
    """Open the run in the thread that will answer."""
    import torch

    torch.set_num_threads(args.threads)
    if not args.shard_actors:
        return Predictor.open(args.run, args.threads)
    return Predictor.open(args.run, args.threads, opener=lambda index, threads: ActorSearcher(index, args.shard_actors, threads))


def capacity(args: ServeArgs) -> int:
    """Requests that a replica takes: a batch in work, one being gathered, and those that wait."""
    return 2 * args.max_batch + args.max_queued


def build_app(args: dict[str, Any]) -> serve.Application:
    """The Serve application; YAML names it as `retrikt_ray.serving.app:build_app`. Raises ConfigError that names a wrong key."""
    parsed = parse_args(args)
    parsed = parsed.model_copy(update={"run": Folder.at(parsed.run).uri})  # a replica's working directory is another
    deployment = serve.deployment(
        name="Endpoint",
        num_replicas=parsed.replicas,
        ray_actor_options={"num_cpus": parsed.threads},
        max_ongoing_requests=capacity(parsed) + 16,  # beyond `capacity` the replica itself refuses, in JSON
        max_queued_requests=1000
        + capacity(parsed),  # of those on their way to a replica; a flood beyond it gets Ray's own 503, in plain text
        backpressure_config={"retry_after_s": 1},
        max_constructor_retry_count=2,  # an artifact that cannot be opened stays so
        graceful_shutdown_wait_loop_s=0.2,
        graceful_shutdown_timeout_s=5,  # an answer takes milliseconds
    )(serve.ingress()(Endpoint))
    return deployment.bind(parsed.model_dump())


def check_port(host: str, port: int) -> None:
    """Raises ConfigError where nothing can listen: Serve itself would only log it and retry."""
    if not 1 <= port <= 65535:
        raise ConfigError(f"port: found {port}, expected 1 to 65535")
    try:
        family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        with socket.socket(family, kind, proto) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        raise ConfigError(f"cannot listen on {host}:{port}: {error.strerror}; choose another --port or --host") from None


def serve_run(run: str, host: str, port: int, args: dict[str, Any]) -> None:
    """Serve a run on this machine until SIGINT or SIGTERM (`retrikt serve RUN`).

    1. Refuse a bad argument, a busy port, and a damaged artifact before anything starts.  2. Start Ray and Serve.  3. Wait.  4. Shut down.
    """
    import ray
    from transformers.utils.logging import disable_progress_bar

    from retrikt_ray.runtime import cluster
    from retrikt_ray.runtime.progress import console

    # 1. refuse
    app = build_app(args | {"run": run})
    if os.environ.get("RAY_ADDRESS"):
        raise ConfigError(
            "RAY_ADDRESS is set: `retrikt serve` starts a server of its own; on a cluster use `serve deploy serve/retrikt.yaml`"
        )
    check_port(host, port)
    disable_progress_bar()
    example = {"text": "a text", "text_pair": "another"} if Predictor.open(run).task["pair"] else "a text"

    # 2. start
    os.environ.setdefault("RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S", "0")  # nobody takes over from a server that stops
    stop = threading.Event()
    try:
        cluster.connect()
        serve.start(http_options={"host": host, "port": port})
        cluster.quiet(None)  # Serve has just given its logger a handler
        serve.run(app, name=APP)
        before = {number: signal.signal(number, lambda *_: stop.set()) for number in (signal.SIGINT, signal.SIGTERM)}

        # 3. wait
        url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        console.print(f"serving {run} on {url} (page; API in /openapi.json); Ctrl-C stops", markup=False)
        console.print(f"  curl -H 'Content-Type: application/json' -d '{json.dumps({'inputs': example})}' {url}/predict", markup=False)
        stop.wait()
        for number, handler in before.items():  # a second Ctrl-C ends it at once
            signal.signal(number, handler)
        console.print("stopping", markup=False)
    except KeyboardInterrupt:  # before our handler was there
        console.print("stopped before the server was ready", markup=False)
    finally:
        # 4. shut down
        if ray.is_initialized():
            shut_down(ray)


def shut_down(ray: Any) -> None:
    """Stop Serve and Ray, and leave even if Ray's processes were killed first (a signal to the whole group), when Ray would wait a minute."""
    leave = threading.Timer(12, os._exit, (1,))
    leave.daemon = True
    leave.start()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):  # Ray reports its own stopping as errors
        serve.shutdown()
        ray.shutdown()
    leave.cancel()

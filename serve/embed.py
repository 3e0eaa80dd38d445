"""A student inside a FastAPI app of your own, without Ray: the same answers as `retrikt serve`, to the last bit.

    RUN=runs/quickstart uvicorn serve.embed:app

`Predictor` is made for one thread at a time, so the route is a coroutine that gives its work to one thread; what waits meanwhile costs nothing.
"""

from __future__ import annotations

import asyncio
import os
from concurrent.futures import ThreadPoolExecutor

from fastapi import FastAPI

from retrikt_ray import Predictor

app = FastAPI()
thread = ThreadPoolExecutor(1)
predictor = thread.submit(Predictor.open, os.environ["RUN"]).result()


@app.post("/tickets")
async def route_ticket(subject: str) -> dict[str, object]:
    """Whose desk a ticket belongs on, and the three rows that it is most like."""
    answer = await asyncio.get_running_loop().run_in_executor(thread, predictor.predict, subject)
    similar = [{"text": row.text, "label": row.label} for row in answer.neighbours[0][:3]]
    return {"desk": answer.labels[0], "probability": answer.scores[0], "similar": similar}


@app.post("/reload")
async def reload() -> dict[str, int]:
    """Take over what was added to the knowledge since."""
    await asyncio.get_running_loop().run_in_executor(thread, predictor.knowledge.refresh)
    return {"rows": len(predictor.knowledge)}

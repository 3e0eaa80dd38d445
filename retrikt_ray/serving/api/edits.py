"""Knowledge over HTTP: rows are listed, put, deleted, and edits tried out. The log is the one that the command line writes.

A replica edits in a thread of its own, under the lock that keeps all writers of a run apart; it sees the result at once, the others with
their next request. An edit may say which version it was made for (`If-Match`), and is refused where the knowledge has gone on since.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from retrikt_ray.knowledge.edit import Change, UnknownRow
from retrikt_ray.knowledge.knowledge import Knowledge, VersionError
from retrikt_ray.predictor import Prediction
from retrikt_ray.runtime.leases.lease import LeaseHeld, LeaseLost
from retrikt_ray.runtime.settings import ConfigError
from retrikt_ray.serving.api.reading import Refusal
from retrikt_ray.serving.opened import Opened, record
from retrikt_ray.serving.replica import Endpoint
from retrikt_ray.task.texts import Text, TextError, short

MOST_EDITS = 32  # that wait in a replica
MOST_LISTED = 200
SAME_VALUE = 1e-6  # values of a regression that differ by less are the same
QUERY: dict[str, tuple[dict[str, Any], str]] = {  # of GET /knowledge
    "q": ({"type": "string"}, "Only rows that hold these words, whatever their case."),
    "label": ({"type": "string"}, "Only rows that the teacher gives this label."),
    "source": ({"type": "string"}, "Only rows of this source: generated, corpus, task, unlabelled or added."),
    "offset": ({"type": "integer", "minimum": 0, "default": 0}, "Rows to pass over."),
    "limit": ({"type": "integer", "minimum": 1, "maximum": MOST_LISTED, "default": 50}, "Rows to answer with."),
}
PAGING = {name: (schema["default"], schema["minimum"], schema.get("maximum")) for name, (schema, _) in QUERY.items() if "default" in schema}


def expected_version(header: str | None) -> str | None:
    """Of If-Match: the version, "5e1d3a0c9b7f.12"; None: any. Raises Refusal 422."""
    if header is None or header.strip() == "*":
        return None
    found = re.fullmatch(r'\s*(?:W/)?"?([0-9a-f]{12}\.\d{1,18})"?\s*', header)
    if not found:
        raise Refusal(422, f"If-Match: found {header[:40]!r}", 'a version such as "5e1d3a0c9b7f.12", as in ETag')
    return found[1]


def number_of(opened: Opened, version: str | None) -> int | None:
    """The edits of a version, which has to be one of this run. Raises Refusal 412."""
    if version is None:
        return None
    release, _, number = version.partition(".")
    if release != opened.predictor.release:
        raise Refusal(412, "the edit was made for another run than the one that answers", "the version that GET /knowledge tells")
    return int(number)


async def edited(endpoint: Endpoint, opened: Opened, work: Callable[[], Any]) -> Any:
    """Do something to the knowledge in the replica's editing thread, with errors that a user can cause as refusals."""
    if endpoint.editing >= MOST_EDITS:
        raise Refusal(503, f"{endpoint.editing} edits are waiting already", "the same request a second later", {"Retry-After": "1"})
    endpoint.editing += 1
    try:
        return await endpoint.apart(endpoint.editor, work)
    except VersionError as error:
        raise Refusal(412, str(error), "the version that GET /knowledge tells, and a look at what has changed") from None
    except UnknownRow as error:
        raise Refusal(404, plain(opened, error), "ids that GET /knowledge tells") from None
    except TextError as error:
        raise Refusal(422, error.found, error.expected) from None
    except (LeaseHeld, LeaseLost):  # who has it is for the log of its owner
        again = "the same request some seconds later"
        raise Refusal(
            503, "another process has the right to edit this knowledge; nothing was written", again, {"Retry-After": "5"}
        ) from None
    except ConfigError as error:
        raise Refusal(422, plain(opened, error), "rows with text, and label or teacher_probs or neither") from None
    finally:
        endpoint.editing -= 1


def plain(opened: Opened, error: Exception) -> str:
    """A message without the place of the run, which is nobody's business."""
    return str(error).replace(str(opened.predictor.knowledge.places.run), "the run")


async def put(endpoint: Endpoint, rows: list[Any], version: str | None) -> dict[str, Any]:
    """Add rows, or put them in place of those that have their ids."""
    limit(endpoint, rows, "rows")
    return await changed(endpoint, "put", version, lambda knowledge, number: knowledge.put(rows, number))


async def delete(endpoint: Endpoint, ids: list[str], version: str | None) -> dict[str, Any]:
    """Delete rows, all or none."""
    limit(endpoint, ids, "ids")
    return await changed(endpoint, "delete", version, lambda knowledge, number: knowledge.delete(ids, number))


async def changed(endpoint: Endpoint, kind: str, version: str | None, work: Callable[[Knowledge, int | None], Change]) -> dict[str, Any]:
    """What an edit did. version: that it was made for; kind: as it is counted."""
    opened = endpoint.opened
    number = number_of(opened, version)
    change: Change = await edited(endpoint, opened, lambda: work(opened.predictor.knowledge, number))
    endpoint.metrics.edits.labels(kind).inc()
    return {"version": f"{opened.predictor.release}.{change.version}", "ids": change.ids, "before": change.before}


async def preview(endpoint: Endpoint, rows: list[Any], ids: list[str], texts: list[Text]) -> dict[str, Any]:
    """What an edit would do to the answers to some texts."""
    limit(endpoint, rows, "rows")
    limit(endpoint, ids, "ids")
    opened = endpoint.opened
    now, then = await edited(endpoint, opened, lambda: opened.predictor.knowledge.preview(rows, ids))
    if endpoint.opened is not opened:
        raise Refusal(503, "another run has taken over meanwhile", "the same request a second later", {"Retry-After": "1"})

    def work() -> tuple[Prediction, Prediction]:
        with opened.predictor.knowledge.lock:
            before, after = (opened.predictor.answer(texts, False, view) for view in (now, then))
            return before, after

    before, after = await endpoint.apart(opened.worker, work)
    answers = [
        {"changed": differs(a, b), "before": opened.scores(a), "after": opened.scores(b)}
        for a, b in zip(before.answers, after.answers, strict=True)
    ]
    return {"version": opened.version(now), "answers": answers}


def differs(before: np.ndarray, after: np.ndarray) -> bool:
    """Whether two answers (C,) name another label; in regression, another value."""
    return bool(abs(before[0] - after[0]) > SAME_VALUE if len(before) == 1 else before.argmax() != after.argmax())


async def listing(endpoint: Endpoint, query: Mapping[str, str]) -> dict[str, Any]:
    """Some rows, newest first. query: keys of QUERY."""
    unknown = sorted(query.keys() - QUERY.keys())
    if unknown:
        raise Refusal(422, f"there is no parameter {short(unknown[0])}", ", ".join(QUERY))
    offset, most = (number(query.get(name), name, *bounds) for name, bounds in PAGING.items())
    opened = endpoint.opened
    words, label, source = query.get("q", ""), query.get("label"), query.get("source")

    def work() -> dict[str, Any]:
        with opened.predictor.knowledge.lock:
            opened.predictor.knowledge.refresh()
            view = opened.predictor.knowledge.view
            if source is not None and source not in view.sources:
                return {"version": opened.version(view), "total": 0, "rows": []}  # nothing was added yet
            found = view.listed(words, label, source)
            rows = [record(view.neighbour(int(p))) for p in found[offset : offset + most]]
            return {"version": opened.version(view), "total": len(found), "rows": rows}

    try:
        return dict(await endpoint.apart(opened.worker, work))
    except ConfigError as error:
        raise Refusal(422, str(error), "a label of the task") from None


def limit(endpoint: Endpoint, items: list[Any], name: str) -> None:
    most, chars = endpoint.args.max_texts, endpoint.args.max_text_chars
    if len(items) > most:
        raise Refusal(413, f"{name} holds {len(items)}", f"at most {most} a request; `retrikt store add` takes files of any size")
    for i, item in enumerate(items):
        for key, value in item.items() if isinstance(item, dict) else [("", item)]:
            if isinstance(value, str) and len(value) > chars:
                where = f"{name}[{i}]" + (f".{key}" if key in ("id", "text", "text_pair", "label") else "")
                raise Refusal(413, f"{where} has {len(value)} characters", f"at most {chars} characters")


def number(given: str | None, name: str, default: int, low: int, high: int | None) -> int:
    """A number of a query. Raises Refusal 422."""
    if given is None:
        return default
    if not (given.isascii() and given.isdigit() and len(given) < 16) or int(given) < low or (high is not None and int(given) > high):
        raise Refusal(422, f"{name}: found {short(given)}", f"a whole number from {low}" + (f" to {high}" if high else ""))
    return int(given)

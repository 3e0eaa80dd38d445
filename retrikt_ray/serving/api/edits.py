"""Knowledge over HTTP: rows are listed, put, deleted, and edits tried out. The log is the one that the command line writes.

A replica edits in a thread of its own, under the lock that keeps all writers of a run apart; all see the result with their next
request. An edit may say which version it was made for (`If-Match`), and is refused where the knowledge has gone on since.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from retrikt_ray.knowledge.edit import Change, UnknownRow
from retrikt_ray.knowledge.knowledge import VersionError
from retrikt_ray.runtime.leases.lease import LeaseHeld, LeaseLost
from retrikt_ray.runtime.settings import ConfigError
from retrikt_ray.serving.answering.process import Away
from retrikt_ray.serving.api.reading import Refusal
from retrikt_ray.serving.replica import Endpoint
from retrikt_ray.task.texts import Text, TextError, short

if TYPE_CHECKING:
    from retrikt_ray.serving.answering.opened import Opened

MOST_EDITS = 32  # that wait in a replica
MOST_LISTED = 200
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


def number_of(opened: Opened | Away, version: str | None) -> int | None:
    """The edits of a version, which has to be one of this run. Raises Refusal 412."""
    if version is None:
        return None
    release, _, number = version.partition(".")
    if release != opened.facts.release:
        raise Refusal(412, "the edit was made for another run than the one that answers", "the version that GET /knowledge tells")
    return int(number)


async def edited(endpoint: Endpoint, opened: Opened | Away, name: str, *args: Any) -> Any:
    """What the editing thread of a run does, with errors that a user can cause as refusals."""
    if endpoint.editing >= MOST_EDITS:
        raise Refusal(503, f"{endpoint.editing} edits are waiting already", "the same request a second later", {"Retry-After": "1"})
    endpoint.editing += 1
    try:
        return await endpoint.asked(opened, name, *args)
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


def plain(opened: Opened | Away, error: Exception) -> str:
    """A message without the place of the run, which is nobody's business."""
    return str(error).replace(opened.facts.place, "the run")


async def put(endpoint: Endpoint, rows: list[Any], version: str | None) -> dict[str, Any]:
    """Add rows, or put them in place of those that have their ids."""
    limit(endpoint, rows, "rows")
    return await changed(endpoint, "put", version, rows)


async def delete(endpoint: Endpoint, ids: list[str], version: str | None) -> dict[str, Any]:
    """Delete rows, all or none."""
    limit(endpoint, ids, "ids")
    return await changed(endpoint, "delete", version, ids)


async def changed(endpoint: Endpoint, kind: str, version: str | None, what: list[Any]) -> dict[str, Any]:
    """What an edit did. kind: put | delete; version: that it was made for."""
    opened = endpoint.opened
    number = number_of(opened, version)
    change: Change = await edited(endpoint, opened, kind, what, number)
    endpoint.metrics.edits.labels(kind).inc()
    return {"version": f"{opened.facts.release}.{change.version}", "ids": change.ids, "before": change.before}


async def preview(endpoint: Endpoint, rows: list[Any], ids: list[str], texts: list[Text]) -> dict[str, Any]:
    """What an edit would do to the answers to some texts."""
    limit(endpoint, rows, "rows")
    limit(endpoint, ids, "ids")
    opened = endpoint.opened
    found = dict(await edited(endpoint, opened, "preview", rows, ids, texts))
    if endpoint.opened is not opened:
        raise Refusal(503, "another run has taken over meanwhile", "the same request a second later", {"Retry-After": "1"})
    return found


async def listing(endpoint: Endpoint, query: Mapping[str, str]) -> dict[str, Any]:
    """Some rows, newest first. query: keys of QUERY."""
    unknown = sorted(query.keys() - QUERY.keys())
    if unknown:
        raise Refusal(422, f"there is no parameter {short(unknown[0])}", ", ".join(QUERY))
    offset, most = (number(query.get(name), name, *bounds) for name, bounds in PAGING.items())
    try:
        return dict(
            await endpoint.asked(endpoint.opened, "listing", query.get("q", ""), query.get("label"), query.get("source"), offset, most)
        )
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

"""A client for a served run, on the standard library alone: copy it where you need it.

python serve/client.py --url http://127.0.0.1:8000 "a fine film" "dull and slow"
python serve/client.py --pair "a man sleeps" "someone is asleep" --explain
"""

from __future__ import annotations

import argparse
import json
import sys
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypedDict


class Score(TypedDict):
    """One label of a prediction; in regression the label is LABEL_0 and the score is the value."""

    label: str
    score: float


class Neighbour(TypedDict):
    """One row of the knowledge store."""

    id: str
    text: str
    text_pair: str | None
    source: str
    label: str
    score: float
    similarity: float


class Explanation(TypedDict):
    """A prediction with what it rests on."""

    prediction: list[Score]
    student: list[Score]
    neighbours: list[Neighbour]
    mixture: dict[str, float]


class ServerError(Exception):
    """The server cannot be reached, or refused. `status` is 0 where there was no answer."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


Item = str | tuple[str, str]  # a text, or the two texts of a pair task


@dataclass(frozen=True)
class Client:
    """Calls a server; each method takes a list of texts and gives one answer per text, in order."""

    url: str = "http://127.0.0.1:8000"
    timeout_s: float = 30.0

    def predict(self, items: Sequence[Item], top_k: int | None = None) -> list[list[Score]]:
        """Labels and scores, best first."""
        return self._call("predict", {"inputs": _inputs(items)} | ({} if top_k is None else {"top_k": top_k}))

    def retrieve(self, items: Sequence[Item], k: int = 8) -> list[list[Neighbour]]:
        """The k nearest rows of the store."""
        return self._call("retrieve", {"inputs": _inputs(items), "k": k})

    def explain(self, items: Sequence[Item]) -> list[Explanation]:
        """Predictions with the neighbours that voted."""
        return self._call("explain", {"inputs": _inputs(items)})

    def info(self) -> dict[str, Any]:
        """What is served: task, labels, sizes, limits."""
        return self._call("info")

    def _call(self, route: str, body: dict[str, Any] | None = None) -> Any:
        address = f"{self.url.rstrip('/')}/{route}"
        if not address.startswith(("http://", "https://")):
            raise ServerError(0, f"{self.url}: expected a URL such as http://127.0.0.1:8000")
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(address, data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=self.timeout_s) as response:
                return json.load(response)
        except urllib.error.HTTPError as error:
            raise ServerError(error.code, f"{address} answered {error.code}: {_reason(error.read())}") from None
        except (OSError, ValueError) as error:  # URLError and time-outs are OSErrors; an answer that is not JSON is a ValueError
            raise ServerError(0, f"{address}: {getattr(error, 'reason', error)}") from None


def _inputs(items: Sequence[Item]) -> list[Any]:
    if isinstance(items, str):
        raise TypeError("expected a list of texts, found one str")
    return [i if isinstance(i, str) else {"text": i[0], "text_pair": i[1]} for i in items]


def _reason(body: bytes) -> str:
    """The server's own words; Ray Serve's plain text where the answer is not the app's."""
    try:
        problem = json.loads(body)
        return problem["error"] + (f"; expected: {problem['expected']}" if problem.get("expected") else "")
    except (ValueError, TypeError, KeyError):
        return body.decode(errors="replace").strip() or "no reason given"


def main() -> int:
    """The command line: JSON lines out, errors to stderr with exit code 1."""
    parser = argparse.ArgumentParser(description="Ask a served retrikt run; prints one JSON line per text.")
    parser.add_argument("texts", nargs="+", metavar="TEXT")
    parser.add_argument("--url", default=Client.url)
    parser.add_argument("--pair", action="store_true", help="the texts are the two texts of one pair")
    ways = parser.add_mutually_exclusive_group()
    ways.add_argument("--explain", action="store_true", help="with the neighbours that voted")
    ways.add_argument("--retrieve", type=int, metavar="K", help="only the K nearest rows of the store")
    args = parser.parse_args()
    if args.pair and len(args.texts) != 2:
        parser.error("--pair needs exactly two texts")
    items: list[Item] = [(args.texts[0], args.texts[1])] if args.pair else args.texts
    client = Client(args.url)
    try:
        answers = (
            client.explain(items) if args.explain else client.retrieve(items, args.retrieve) if args.retrieve else client.predict(items)
        )
    except ServerError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for answer in answers:
        print(json.dumps(answer, ensure_ascii=False))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""A client for a served run, on the standard library alone: copy it where you need it.

python serve/client.py --url http://127.0.0.1:8000 "a fine film" "dull and slow"
python serve/client.py --pair "a man sleeps" "someone is asleep" --explain
python serve/client.py --retrieve 3 --mode hybrid "a fine film"
"""

from __future__ import annotations

import argparse
import json
import sys
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NotRequired, TypedDict


class Score(TypedDict):
    """One label of a prediction; in regression the label is LABEL_0 and the score is the value."""

    label: str
    score: float


class Without(TypedDict):
    """The likeliest label where one row has no vote, and what becomes of the score of the label that is predicted."""

    label: str
    score: float
    change: float


class Neighbour(TypedDict):
    """One row of the knowledge store, with its similarity where it was found by vectors, its BM25 score where it was found by words."""

    id: str
    text: str
    text_pair: str | None
    source: str
    label: str
    score: float
    similarity: NotRequired[float]
    bm25: NotRequired[float]
    without: NotRequired[Without]  # of rows that voted


class Sides(TypedDict):
    """The nearest rows, and those that share most words."""

    dense: list[Neighbour]
    lexical: list[Neighbour]


class Spoken(TypedDict):
    """A word or word pair of the text, and what it adds to the log-odds of the predicted label (to the value, in regression)."""

    ngram: str
    weight: float


class Votes(TypedDict):
    """What the rows of either side say together, and the n-gram memory; None where nothing was found."""

    dense: list[Score] | None
    lexical: list[Score] | None
    ngrams: list[Score] | None


class Explanation(TypedDict):
    """A prediction with what it rests on."""

    prediction: list[Score]
    told: str | None  # id of the added row that is this text word for word, whose label is the answer
    student: list[Score]
    votes: Votes
    without: dict[str, list[Score] | None]  # the answer without each voice; None where nothing would be left
    neighbours: list[Neighbour]
    lexical_neighbours: list[Neighbour]
    ngrams: list[Spoken]  # those that say most, strongest first
    mixture: dict[str, float | list[float]]  # weights of the student and the votes, how rows vote, and what class frequencies add


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

    def retrieve(
        self,
        items: Sequence[Item],
        k: int = 8,
        mode: Literal["dense", "lexical"] = "dense",
        label: str | None = None,
        source: str | None = None,
    ) -> list[list[Neighbour]]:
        """The k nearest rows of the store, or the k that share most words; label, source: only such rows."""
        return self._call("retrieve", {"inputs": _inputs(items), "k": k, "mode": mode, "label": label, "source": source})

    def retrieve_both(self, items: Sequence[Item], k: int = 8, label: str | None = None, source: str | None = None) -> list[Sides]:
        """k rows found by vectors and k found by words, apart."""
        return self._call("retrieve", {"inputs": _inputs(items), "k": k, "mode": "hybrid", "label": label, "source": source})

    def explain(self, items: Sequence[Item]) -> list[Explanation]:
        """Predictions with the rows and n-grams that they rest on."""
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
    ways.add_argument("--explain", action="store_true", help="with the rows and n-grams that it rests on")
    ways.add_argument("--retrieve", type=int, metavar="K", help="only the K nearest rows of the store")
    parser.add_argument("--mode", choices=("dense", "lexical", "hybrid"), help="with --retrieve: by vectors (default), by words, or both")
    parser.add_argument("--label", help="with --retrieve: only rows of this label")
    parser.add_argument("--source", help="with --retrieve: only rows of this source")
    args = parser.parse_args()
    if args.pair and len(args.texts) != 2:
        parser.error("--pair needs exactly two texts")
    if args.retrieve is None and (args.mode or args.label or args.source):
        parser.error("--mode, --label and --source go with --retrieve")
    items: list[Item] = [(args.texts[0], args.texts[1])] if args.pair else args.texts
    client = Client(args.url)
    answers: Sequence[Any]
    try:
        if args.explain:
            answers = client.explain(items)
        elif args.retrieve is None:
            answers = client.predict(items)
        elif args.mode == "hybrid":
            answers = client.retrieve_both(items, args.retrieve, args.label, args.source)
        else:
            answers = client.retrieve(items, args.retrieve, args.mode or "dense", args.label, args.source)
    except ServerError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for answer in answers:
        print(json.dumps(answer, ensure_ascii=False))
    return 0


if __name__ == "__main__":
    sys.exit(main())

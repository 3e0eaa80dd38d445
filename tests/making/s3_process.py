"""moto's S3 in a process of its own: `python s3_process.py PORT [JOURNAL]`.

Requests are answered one at a time, as if they were atomic, which S3's are and moto's conditional ones are not: it asks whether an object is there,
and then writes. A request whose body was cut (its sender was killed) changes nothing. JOURNAL gets a line of JSON for each write that was accepted.
"""

from __future__ import annotations

import io
import json
import sys
import threading
from collections.abc import Callable, Iterable
from typing import Any

from moto.moto_server.werkzeug_app import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
from werkzeug.serving import run_simple

ANSWERED = threading.Lock()
KEPT = ("lease.json", "manifest.json", "config.yaml", "state.json")  # whose contents are in the journal


def atomic(app: Callable[..., Iterable[bytes]], journal: str | None) -> Callable[..., Iterable[bytes]]:
    def answer(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        size = int(environ.get("CONTENT_LENGTH") or 0)
        body = environ["wsgi.input"].read(size) if size else b""
        if len(body) < size:
            start_response("400 Bad Request", [])
            return [b""]
        environ["wsgi.input"] = io.BytesIO(body)
        told: list[str] = []

        def start(status: str, headers: list[tuple[str, str]], *rest: Any) -> Any:
            told.append(status)
            return start_response(status, headers, *rest)

        with ANSWERED:
            answered = list(app(environ, start))
            if journal and environ["REQUEST_METHOD"] in ("PUT", "DELETE", "POST") and told[0][0] == "2":
                line = {"method": environ["REQUEST_METHOD"], "path": environ["PATH_INFO"]}
                if line["path"].endswith(KEPT) and body:
                    line["body"] = contents(body)
                with open(journal, "a") as file:
                    file.write(json.dumps(line) + "\n")
        return answered

    return answer


def contents(body: bytes) -> str:
    """Of a request, whose body comes in chunks where the client adds a checksum."""
    head, _, rest = body.partition(b"\r\n")
    try:
        return rest[: int(head.split(b";")[0], 16)].decode()
    except ValueError:
        return body.decode()


if __name__ == "__main__":
    port, *journal = sys.argv[1:]
    app = DomainDispatcherApplication(create_backend_app)
    run_simple("127.0.0.1", int(port), atomic(app, *(journal or [None])), threaded=True, request_handler=MotoRequestHandler)

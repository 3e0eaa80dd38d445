"""Serving a run over HTTP on Ray Serve: the application that a Serve config names, and `retrikt serve`."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import socket
import threading
from typing import Any

from ray import serve

from retrikt_ray.predictor import Predictor
from retrikt_ray.runtime.folders import Folder
from retrikt_ray.runtime.settings import ConfigError
from retrikt_ray.serving.args import parse_args
from retrikt_ray.serving.replica import Endpoint

APP = "retrikt"


def build_app(args: dict[str, Any]) -> serve.Application:
    """The Serve application; YAML names it as `retrikt_ray.serving.app:build_app`. Raises ConfigError that names a wrong key."""
    parsed = parse_args(args)
    parsed = parsed.model_copy(update={"run": Folder.at(parsed.run).uri})  # a replica's working directory is another
    deployment = serve.deployment(
        name="Endpoint",
        num_replicas=parsed.replicas,
        ray_actor_options={"num_cpus": parsed.threads},
        max_ongoing_requests=parsed.capacity + 16,  # beyond `capacity` the replica itself refuses, in JSON
        max_queued_requests=1000
        + parsed.capacity,  # of those on their way to a replica; a flood beyond it gets Ray's own 503, in plain text
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
    example = {"text": "a text", "text_pair": "another"} if Predictor.open(run).task.pair else "a text"

    # 2. start
    os.environ.setdefault("RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S", "0")  # nobody takes over from a server that stops
    stop, served = threading.Event(), False
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
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):  # Ray reports its own stopping as errors
        if served:
            serve.delete(APP)  # what was asked is answered first: `shutdown` alone would cut it off
        serve.shutdown()
        ray.shutdown()
    leave.cancel()

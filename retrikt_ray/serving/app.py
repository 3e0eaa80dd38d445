"""The application that a Serve config names: how replicas are built, and what they do when `serve deploy` brings another run."""

from __future__ import annotations

import asyncio
import ipaddress
import os
import threading
from typing import Any

from retrikt_ray.runtime.artifacts import check
from retrikt_ray.runtime.folders import ArtifactError, Folder
from retrikt_ray.runtime.settings import ConfigError
from retrikt_ray.serving.answering.process import Process
from retrikt_ray.serving.answering.shards import ShardGroup
from retrikt_ray.serving.api.guard import Keys
from retrikt_ray.serving.api.routes import build_api
from retrikt_ray.serving.args import parse_args, parse_swap
from retrikt_ray.serving.held import several
from retrikt_ray.serving.replica import Endpoint

LINGER_S = 0.1
PROCESS_BYTES, ROW_BYTES = 700e6, 500  # of what answers: Python with its libraries; a row's text, id and labels in memory
ROUTES_BYTES = 300e6  # of a replica whose answers are computed in a process beside it


def memory_of(run: Folder, groups: int) -> tuple[int, int]:
    """Bytes that a replica is counted with, by the manifests of the run, and those of a group of shards: its processes; student, index and the
    rows of the store; the group's part of the shards."""
    try:
        files = [size["bytes"] for name in ("student", "index") for size in check(run / name, only=[]).files.values()]
        shards = sum(shard["bytes"] for shard in (run / "index").read_json("index.json")["shards"]) if groups else 0
        rows = sum(check(run / "store", only=[]).rows.values())
    except (ArtifactError, OSError):  # not to be read from here: the replica will say why, or be on a node that can
        return int(PROCESS_BYTES + ROUTES_BYTES), int(PROCESS_BYTES)
    routes = 0 if groups else ROUTES_BYTES
    return int(PROCESS_BYTES + routes + sum(files) - shards + ROW_BYTES * rows), int(PROCESS_BYTES + shards / max(1, groups))


def build_app(args: dict[str, Any]) -> Any:
    """The Serve application; YAML names it as `retrikt_ray.serving.app:build_app`. Raises ConfigError that names a wrong key."""
    from ray import serve

    parsed = parse_args(args)
    Keys.load(parsed)
    run = Folder.at(parsed.run)
    runs = Folder.at(parsed.runs).uri if parsed.runs else None
    parsed = parsed.model_copy(update={"run": run.uri, "runs": runs})  # a replica's working directory is another
    student_bytes, group_bytes = memory_of(run, parsed.shard_groups)
    if parsed.runs:  # counted as if they were of the size of the server's own
        student_bytes += parsed.runs_held * (memory_of(run, 0)[0] - int(PROCESS_BYTES + ROUTES_BYTES))
    groups = [
        serve.deployment(
            name=f"Shards{number}",
            ray_actor_options={"num_cpus": parsed.threads, "memory": group_bytes},
            max_ongoing_requests=64,  # a batch each of so many replicas
            health_check_period_s=5,
            graceful_shutdown_wait_loop_s=0.2,
            graceful_shutdown_timeout_s=5,
        )(ServedShards).bind(number, parsed.shard_groups, parsed.threads)
        for number in range(parsed.shard_groups)
    ]
    deployment = serve.deployment(
        name="Endpoint",
        num_replicas=parsed.replicas,
        ray_actor_options={"num_cpus": parsed.threads, "memory": student_bytes},
        max_ongoing_requests=parsed.capacity + 16,  # beyond `capacity` the replica itself refuses, in JSON
        max_queued_requests=1000
        + parsed.capacity,  # of those on their way to a replica; a flood beyond it gets Ray's own 503, in plain text
        backpressure_config={"retry_after_s": 1},
        max_constructor_retry_count=2,  # an artifact that cannot be opened stays so
        health_check_period_s=5,
        health_check_timeout_s=parsed.deadline_s + 5,
        graceful_shutdown_wait_loop_s=0.2,
        graceful_shutdown_timeout_s=5,  # an answer takes milliseconds
        logging_config={"enable_access_log": False},  # paths and queries are what users sent
    )(serve.ingress()(Served))
    return deployment.bind(parsed.model_dump(), groups)


class Served(Endpoint):
    """An Endpoint as Serve opens it."""

    def __init__(self, args: dict[str, Any], groups: list[Any]) -> None:
        for group in groups:
            group._init(_run_router_in_separate_loop=True)  # it is asked from threads, in Serve's throughput mode, too
        # Handles of Serve are for its own processes: with groups of shards, all is one process.
        super().__init__(args, groups, process=None if groups else Process(gone=leave))
        if self.args.runs:
            self.hold = several(self, Folder.at(self.args.runs))

    async def reconfigure(self, user_config: Any) -> None:
        """Answer from the run that the config names. One that cannot be taken over is refused, which /info and the metrics tell.

        Nothing is raised: Serve would end a replica that answers well.
        """
        try:
            run = parse_swap(user_config).run
        except ConfigError as error:
            self.refuse("user_config", error)
            return
        if run != self.opened.run or self.refused:
            await asyncio.to_thread(self.swap, run)

    async def check_health(self) -> None:
        """Serve ends a replica that fails this three times in a row, and starts another: one that cannot answer, whatever its process does."""
        await self.answers()

    def __serve_build_asgi_app__(self) -> Any:
        stay_on_loopback()
        return build_api(self, echo=False)


def leave() -> None:
    """End this replica, for which nothing answers any more, once its clients have been told so. Serve starts another one."""
    end = threading.Timer(LINGER_S, os._exit, [1])
    end.daemon = True
    end.start()


class ServedShards(ShardGroup):
    """A ShardGroup as Serve opens it."""

    def __init__(self, number: int, groups: int, threads: int) -> None:
        stay_on_loopback()
        super().__init__(number, groups, threads)


def stay_on_loopback() -> None:
    """Where the node's address is the loopback, have Serve open the port there on which replicas call each other. It would be all interfaces."""
    import ray
    from ray.serve._private import replica

    if not is_loopback(ray.util.get_node_ip_address()):
        return
    opened = replica.add_port_to_grpc_server
    replica.add_port_to_grpc_server = lambda server, address: opened(server, address.replace("[::]:", "127.0.0.1:"))


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"

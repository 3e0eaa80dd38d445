"""The Ray cluster that a command runs on: start or join it, size the workers, and refuse what it can never give.

A request that cannot be met does not fail in Ray, it waits for ever; so every stage asks here first.
"""

from __future__ import annotations

import io
import logging
import os
import sys
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from retrikt_ray.runtime.nodes import ClusterConfig, Nodes, held, launched, standing
from retrikt_ray.runtime.progress import track
from retrikt_ray.runtime.settings import ConfigError, Range, Scaled

SPARE_CPUS = 2  # Ray Data's reading tasks need whole CPUs beside the actors that hold theirs
NO_PROGRESS_S = 600  # after which Ray Data calls it a hang
ENVIRONMENT = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",  # a report blocks for one poll: 2 s by default
    "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "2",  # of the two minutes or thirty seconds that spot nodes have
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "600",  # a node takes minutes to come; by default a training asks anew every minute
    "TOKENIZERS_PARALLELISM": "false",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "OMP_WAIT_POLICY": "PASSIVE",  # spinning torch threads starve each other on few cores
}
joined = ClusterConfig()  # what the cluster that this process is connected to can become
private = False  # it is one of this process alone, which does not grow whatever a config says of another


@dataclass(frozen=True)
class Workers:
    """How many worker processes a stage gets and what each of them reserves."""

    count: int  # at most
    cpus: float
    gpus: float
    least: int | None = None  # that it begins with, and goes on with when nodes vanish; None: `count`
    stage: str = field(default="", compare=False)

    @property
    def threads(self) -> int:
        return max(1, int(self.cpus))

    @property
    def fewest(self) -> int:
        return self.count if self.least is None else self.least


def connect(log_file: Path | None = None, config: ClusterConfig | None = None) -> None:
    """Join the cluster of RAY_ADDRESS (set inside a submitted job), or start a local one.

    A local cluster offers two logical CPUs more than this process may use, for Ray's light coordinating tasks. What is not in the environment of
    a job already goes to its workers on all nodes. Ray's Python logs go to `log_file`; the terminal belongs to progress and results.
    """
    global joined, private
    ours = {name: value for name, value in ENVIRONMENT.items() if name not in os.environ}
    os.environ.update(ours)
    if log_file is not None:
        send_stderr_to(log_file)
    import ray

    elsewhere = bool(os.environ.get("RAY_ADDRESS"))
    if not ray.is_initialized():
        private = not elsewhere
        if elsewhere:
            ray.init(log_to_driver=False, logging_level=logging.ERROR, runtime_env={"env_vars": ours})
        else:
            from joblib import cpu_count  # unlike os.cpu_count it knows a container's share

            os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # a private cluster on the loopback interface
            os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")  # nobody takes its nodes away: a process less a training
            ray.init(
                address="local",
                num_cpus=cpu_count() + SPARE_CPUS,
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
    joined = ClusterConfig() if private or config is None else config
    if elsewhere and not joined.nodes:
        joined = joined.model_copy(update={"nodes": launched()})
    from ray.data import DataContext

    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.execution_no_progress_timeout_s = NO_PROGRESS_S + (joined.wait_s if joined.nodes else 0)  # waiting for a node is no hang
    quiet(log_file)


def send_stderr_to(log_file: Path) -> None:
    """Ray's C++ core writes to file descriptor 2: that becomes the log file, while Python's own stderr stays the terminal."""
    if not isinstance(sys.stderr, io.TextIOWrapper) or sys.stderr.fileno() != 2:
        return  # done before, or captured by a test or a notebook
    log_file.parent.mkdir(parents=True, exist_ok=True)
    sys.stderr.flush()
    sys.stderr = os.fdopen(os.dup(2), "w", buffering=1)
    with open(log_file, "a") as log:
        os.dup2(log.fileno(), 2)


def quiet(log_file: Path | None) -> None:
    """Send the logs of Ray and the Hugging Face libraries to a file, or nowhere."""
    handler: logging.Handler = logging.NullHandler()
    if log_file is not None:
        log_file.parent.mkdir(parents=True, exist_ok=True)
        handler = logging.FileHandler(log_file)
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    for name in ("ray", "ray.data", "ray.train", "ray.serve", "ray.tune", "transformers", "accelerate"):
        logger = logging.getLogger(name)
        for old in list(logger.handlers):
            logger.removeHandler(old)
        if name.count(".") == 0:
            logger.addHandler(handler)
        logger.propagate = name.count(".") > 0
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # of loading weights


def nodes() -> Nodes:
    """The nodes that the connected cluster has, and those it can grow to."""
    return Nodes.of(standing(), joined)


def capacity() -> dict[str, float]:
    """What the cluster has, or can grow to: {"CPU": n, "GPU": n}."""
    have = nodes()
    return {"CPU": have.cpus(), "GPU": have.gpus()}


def plan(config: Scaled, stage: str, *, cpus: float = 1, grow: bool = True) -> Workers:
    """Fill in what the config left open, and refuse what the cluster can never give.

    cpus: CPUs for a worker where the config does not say; grow: take as many workers as fit (data stages) or one per GPU that is there (training).
    Raises ConfigError that names the keys, the request and the capacity.
    """
    have = nodes()
    usable = max(1.0, have.cpus() - SPARE_CPUS)
    gpus = config.gpus_per_worker if config.gpus_per_worker >= 0 else (1.0 if have.gpus() else 0.0)
    each = config.cpus_per_worker or min(cpus, usable, have.widest(gpus) or cpus)
    places = have.places(each, gpus)
    if isinstance(config.workers, Range):
        least, count = config.workers.min, min(config.workers.max, places)
    elif config.workers:
        least = count = config.workers
    elif not grow:
        least = count = max(1, have.places(each, gpus, now=True)) if gpus else 1
    else:
        count = max(1, places if gpus else min(places, int(usable // each)))
        least = 1 if have.grows else count
    if places < least:
        raise ConfigError(refusal(stage, have, least, each, gpus))
    return Workers(count, each, gpus, least if least < count else None, stage)


def refusal(stage: str, have: Nodes, count: int, cpus: float, gpus: float) -> str:
    """Why so many workers can never run: the total, or no node that holds one, or too few such nodes."""
    need = {"CPU": (cpus, have.cpus()), "GPU": (gpus, have.gpus())}
    kind = "GPU" if gpus and not (count * gpus <= have.gpus() and have.places(0, gpus) >= count) else "CPU"
    each, total = need[kind]
    text = f"{stage}.workers={count} with {stage}.{kind.lower()}s_per_worker={each:g} asks for {count * each:g} {kind}s"
    text += f"; the cluster has, or can grow to, {total:g}"
    if count * each <= total:
        text += f", but a worker (CPU {cpus:g}, GPU {gpus:g}) lies on one node, and only {have.places(cpus, gpus)} fit on {have}"
    if os.environ.get("RAY_ADDRESS") and not joined.nodes:
        text += ". If it autoscales, say to what: `cluster.nodes=[{cpu: 8, gpu: 1, max: 4}]`"
    return text


@contextmanager
def room(label: str, cpus: float, gpus: float, fewest: int, most: int) -> Iterator[None]:
    """Nodes for that many workers, where the cluster is one that grows."""
    if not joined.nodes:
        yield
        return
    with held(joined, label, {"CPU": cpus} | ({"GPU": gpus} if gpus else {}), fewest, most):
        yield


def pool(actor: type, arguments: tuple[Any, ...], items: list[dict[str, Any]], workers: Workers) -> Generator[dict[str, Any], None, None]:
    """A Ray Data pool of `actor(*arguments)`: each is handed one item at a time, and the rows that it returns come as they are ready.

    The actor is called with a batch of one item (columns of length 1) and returns a batch of rows.
    """
    import ray.data

    most = max(1, min(workers.count, len(items)))
    fewest = min(workers.fewest, most)
    if fewest == most:
        strategy = ray.data.ActorPoolStrategy(size=most)
    else:  # all are asked for at once, which tells the autoscaler; the pool begins with the first, and lets go of those without work
        strategy = ray.data.ActorPoolStrategy(min_size=fewest, max_size=most, initial_size=most)
    rows = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
        actor,
        fn_constructor_args=arguments,
        batch_size=1,
        compute=strategy,
        num_cpus=workers.cpus,
        num_gpus=workers.gpus or None,
    )
    with room(workers.stage, workers.cpus, workers.gpus, fewest, most):
        yield from rows.iter_rows()


def widest(workers: Workers | None) -> int:
    """Threads that one task may use while no other runs: all CPUs of the plan, as far as one node has them."""
    return 1 if workers is None else max(1, int(min(workers.count * workers.cpus, nodes().widest())))


def each(
    function: Callable[..., Any],
    calls: list[tuple[Any, ...]],
    workers: Workers | None,
    label: str,
    *,
    cpus: float = 0,
    by_reference: bool = False,
) -> list[Any]:
    """function(*call) for every call, as Ray tasks with progress, at most as many at a time as there are workers; or, without workers, here.

    cpus: what a task reserves, else a worker's share. by_reference: results stay in Ray's object store and can be passed on: of a list of
    references inside a call the task gets one result at a time, as it asks for it, so that no node need hold them all (`fetched`).
    """
    if workers is None:
        return [function(*call) for call in calls]
    import ray

    def task(*call: Any) -> Any:
        return function(*(fetched(a) if isinstance(a, list) else a for a in call))

    remote = ray.remote(num_cpus=cpus or workers.cpus)(task)
    started: list[Any] = []
    running: list[Any] = []
    waiting = list(reversed(calls))
    most = min(workers.count, len(calls))
    with room(label, cpus or workers.cpus, 0, 1, most), track(label, len(calls), "tasks") as progress:
        while waiting or running:
            while waiting and len(running) < workers.count:
                started.append(remote.remote(*waiting.pop()))
                running.append(started[-1])
            ready, running = ray.wait(running)
            for reference in ready:
                if not by_reference:
                    ray.get(reference)  # a failure ends the rest at once
                progress.advance()
    return started if by_reference else ray.get(started)


class Fetched(Sequence[Any]):
    """Results of tasks, each got when it is asked for, and kept by nobody."""

    def __init__(self, references: list[Any]) -> None:
        self.references = references

    def __len__(self) -> int:
        return len(self.references)

    def __getitem__(self, place: Any) -> Any:
        import ray

        return ray.get(self.references[place])


def fetched(results: list[Any]) -> Sequence[Any]:
    """Results of `each`, whether they are there or references to them."""
    import ray

    return Fetched(results) if results and isinstance(results[0], ray.ObjectRef) else results

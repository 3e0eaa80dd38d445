"""The Ray cluster that a command runs on: start or join it, size the workers, and refuse what it can never give.

A request that cannot be met does not fail in Ray, it waits for ever; so every stage asks here first.
"""

from __future__ import annotations

import io
import logging
import os
import sys
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from retrikt_ray.runtime.progress import track
from retrikt_ray.runtime.settings import ConfigError, Scaled

SPARE_CPUS = 2  # Ray Data's reading tasks need whole CPUs beside the actors that hold theirs


@dataclass(frozen=True)
class Workers:
    """How many worker processes a stage gets and what each of them reserves."""

    count: int
    cpus: float
    gpus: float

    @property
    def threads(self) -> int:
        return max(1, int(self.cpus))


def connect(log_file: Path | None = None) -> None:
    """Join the cluster of RAY_ADDRESS (set inside a submitted job), or start a local one.

    A local cluster offers two logical CPUs more than there are cores, for Ray's light coordinating tasks.
    Ray's Python logs go to `log_file`; the terminal belongs to progress and results.
    """
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")  # a report blocks for one poll: 2 s by default
    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning torch threads starve each other on few cores
    if log_file is not None:
        send_stderr_to(log_file)
    import ray

    if not ray.is_initialized():
        if os.environ.get("RAY_ADDRESS"):
            ray.init(log_to_driver=False, logging_level=logging.ERROR)
        else:
            os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # a private cluster on the loopback interface
            os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")  # nobody takes its nodes away: a process less a training
            ray.init(
                address="local",
                num_cpus=(os.cpu_count() or 1) + SPARE_CPUS,
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
    from ray.data import DataContext

    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.execution_no_progress_timeout_s = 600  # a hang becomes an error
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


def capacity() -> dict[str, float]:
    """What the cluster has, or can autoscale to where it says so: {"CPU": n, "GPU": n}."""
    import ray
    from ray._private.state import state

    have = ray.cluster_resources()
    limit = state.get_max_resources_from_cluster_config() or {}
    return {kind: max(have.get(kind, 0.0), float(limit.get(kind, 0))) for kind in ("CPU", "GPU")}


def plan(config: Scaled, stage: str, *, cpus: float = 1, grow: bool = True) -> Workers:
    """Fill in what the config left open, and refuse what the cluster can never give.

    cpus: CPUs for a worker where the config does not say; grow: take as many workers as fit (data stages) or one per GPU (training).
    Raises ConfigError that names the keys, the request and the capacity.
    """
    have = capacity()
    usable = max(1.0, have["CPU"] - SPARE_CPUS)
    gpus = config.gpus_per_worker if config.gpus_per_worker >= 0 else (1.0 if have["GPU"] else 0.0)
    each = config.cpus_per_worker or min(cpus, usable)
    if config.workers:
        count = config.workers
    elif gpus:
        count = max(1, int(have["GPU"] // gpus))
    else:
        count = max(1, int(usable // each)) if grow else 1
    for kind, per in (("GPU", gpus), ("CPU", each)):
        if count * per > have[kind]:
            raise ConfigError(
                f"{stage}.workers={count} with {stage}.{kind.lower()}s_per_worker={per:g} asks for {count * per:g} {kind}s; "
                f"the cluster has, or can grow to, {have[kind]:g}"
            )
    return Workers(count, each, gpus)


def pool(actor: type, arguments: tuple[Any, ...], items: list[dict[str, Any]], workers: Workers) -> Generator[dict[str, Any], None, None]:
    """A Ray Data pool of `actor(*arguments)`: each is handed one item at a time, and the rows that it returns come as they are ready.

    The actor is called with a batch of one item (columns of length 1) and returns a batch of rows.
    """
    import ray.data

    rows = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
        actor,
        fn_constructor_args=arguments,
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=max(1, min(workers.count, len(items)))),
        num_cpus=workers.cpus,
        num_gpus=workers.gpus or None,
    )
    yield from rows.iter_rows()


def widest(workers: Workers | None) -> int:
    """Threads that one task may use while no other runs: all CPUs of the plan, as far as one node has them."""
    import ray

    if workers is None:
        return 1
    largest = max(node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"])
    return max(1, int(min(workers.count * workers.cpus, largest)))


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

    cpus: what a task reserves, else a worker's share. by_reference: results stay in Ray's object store and can be passed on; a list or tuple
    of references inside a call is resolved where the task runs.
    """
    if workers is None:
        return [function(*call) for call in calls]
    import ray

    def task(*call: Any) -> Any:
        return function(*(ray.get(a) if isinstance(a, list) and a and isinstance(a[0], ray.ObjectRef) else a for a in call))

    remote = ray.remote(num_cpus=cpus or workers.cpus)(task)
    started: list[Any] = []
    running: list[Any] = []
    waiting = list(reversed(calls))
    with track(label, len(calls), "tasks") as progress:
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

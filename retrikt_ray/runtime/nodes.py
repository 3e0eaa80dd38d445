"""Nodes of a Ray cluster: which there are, which it can grow to, how many workers fit on them, and waiting for some to come.

Ray 2.60 tells which nodes there are, but not which an autoscaler could add. That comes from the config (`cluster.nodes`) or, on a cluster that
`ray up` made, from the launcher's file, which lies on the head node.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from pydantic import Field

from retrikt_ray.runtime.progress import console
from retrikt_ray.runtime.settings import ConfigError, Section

BOOTSTRAP = Path("~/ray_bootstrap_config.yaml")  # where `ray up` puts the launcher's file on the head node
POLL_S, SAY_EVERY_S = 1.0, 10.0


class NodeConfig(Section):
    """A kind of node that the autoscaler can start."""

    cpu: float = Field(ge=0, description="CPUs of one node.")
    gpu: float = Field(0, ge=0, description="GPUs of one node.")
    max: int = Field(ge=1, description="At most so many of them.")


class ClusterConfig(Section):
    """What a cluster that autoscales can become. Left alone, a run plans for the nodes that stand; a local run needs none of this."""

    nodes: tuple[NodeConfig, ...] = Field(
        (),
        description="Kinds of nodes that the autoscaler can start, e.g. [{cpu: 8, gpu: 1, max: 64}]. Left empty: read from the launcher's file on a cluster of `ray up`.",
    )
    wait_s: float = Field(1800, gt=0, description="How long a stage waits for its first nodes before it gives up.")


class Node(NamedTuple):
    """What a node offers."""

    cpus: float
    gpus: float

    def places(self, cpus: float, gpus: float) -> int:
        """Workers of so many CPUs and GPUs that fit on it."""
        return min(int(have / need + 1e-9) for have, need in ((self.cpus, cpus), (self.gpus, gpus)) if need)


@dataclass(frozen=True)
class Nodes:
    """Nodes by what they offer: how many stand now, and to how many they can grow."""

    now: Counter[Node]
    most: Counter[Node]  # at least `now`

    @staticmethod
    def of(standing: list[Node], config: ClusterConfig) -> Nodes:
        now, named = Counter(standing), Counter[Node]()
        for kind in config.nodes:
            named[Node(kind.cpu, kind.gpu)] += kind.max
        return Nodes(now, now | named)  # the larger count of each

    @property
    def grows(self) -> bool:
        return self.most != self.now

    def cpus(self) -> float:
        return sum(node.cpus * count for node, count in self.most.items())

    def gpus(self) -> float:
        return sum(node.gpus * count for node, count in self.most.items())

    def widest(self, gpus: float = 0) -> float:
        """CPUs of the largest node that offers so many GPUs; 0 where none does."""
        return max((node.cpus for node in self.most if node.gpus >= gpus), default=0)

    def places(self, cpus: float, gpus: float, *, now: bool = False) -> int:
        """Workers of so many CPUs and GPUs that fit: a worker lies on one node."""
        return sum(node.places(cpus, gpus) * count for node, count in (self.now if now else self.most).items())

    def __str__(self) -> str:
        kinds = sorted(self.most.items(), reverse=True)
        return ", ".join(f"{count} x (CPU {node.cpus:g}, GPU {node.gpus:g})" for node, count in kinds) or "no nodes"


def standing() -> list[Node]:
    """The nodes of the connected cluster that are alive."""
    import ray

    return [Node(n["Resources"].get("CPU", 0.0), n["Resources"].get("GPU", 0.0)) for n in ray.nodes() if n["Alive"]]


def launched(path: Path = BOOTSTRAP) -> tuple[NodeConfig, ...]:
    """The kinds of worker nodes in the launcher's file, where there is one: `ray up` has filled in what each offers."""
    if not path.expanduser().is_file():
        return ()
    config = yaml.safe_load(path.expanduser().read_text(encoding="utf-8"))
    head, limit = config.get("head_node_type"), config.get("max_workers", 2)
    kinds = [kind for name, kind in config.get("available_node_types", {}).items() if name != head]
    counted = [(kind.get("resources", {}), min(kind.get("max_workers", limit), limit)) for kind in kinds]
    return tuple(NodeConfig(cpu=offer.get("CPU", 0), gpu=offer.get("GPU", 0), max=most) for offer, most in counted if most)


@contextmanager
def held(config: ClusterConfig, label: str, bundle: dict[str, float], fewest: int, most: int) -> Iterator[None]:
    """Ask the autoscaler for nodes with `most` places of `bundle`, wait until `fewest` of them stand, and let the nodes go after the block.

    What runs in the block shows its own demand by tasks and actors that wait for a place, so that a node that vanishes is replaced meanwhile.
    Ray keeps one such request a cluster: jobs side by side overwrite each other's, and rely on that demand.

    Raises ConfigError where they do not come within config.wait_s.
    """
    from ray.autoscaler.sdk import request_resources

    try:
        request_resources(bundles=[bundle] * most)
        wait(config, label, bundle, fewest, most)
        yield
    finally:
        request_resources(bundles=[])


def wait(config: ClusterConfig, label: str, bundle: dict[str, float], fewest: int, most: int) -> None:
    """Wait until `fewest` places of `bundle` stand, and say every ten seconds how it goes."""
    from ray.autoscaler.sdk import request_resources

    began, said = time.monotonic(), 0.0
    offer = ", ".join(f"{kind} {amount:g}" for kind, amount in bundle.items())
    while (found := Nodes.of(standing(), ClusterConfig()).places(bundle.get("CPU", 0), bundle.get("GPU", 0))) < fewest:
        waited = time.monotonic() - began
        line = f"{label}: {found} of {fewest} places for workers ({offer}) stand after {waited:.0f} s"
        if waited > config.wait_s:
            raise ConfigError(
                f"{line}, which is longer than cluster.wait_s={config.wait_s:g}{starting()}. The same command goes on from here; `ray status` on the head node says more"
            )
        if not said or waited - said >= SAY_EVERY_S:
            said = max(waited, 1e-3)
            console.print(f"{line}; waiting for nodes{starting()}", markup=False)
            request_resources(bundles=[bundle] * most)  # anew: another job may have overwritten it
        time.sleep(POLL_S)
    if said:
        console.print(f"{label}: {found} places stand after {time.monotonic() - began:.0f} s", markup=False)


def starting() -> str:
    """What the autoscaler (v2; v1 tells nothing) says of nodes on their way."""
    import ray
    from ray.autoscaler.v2.sdk import get_cluster_status

    status: Any = get_cluster_status(ray.get_runtime_context().gcs_address)
    coming = sum(launch.count for launch in status.pending_launches) + len(status.pending_nodes)
    failed = [launch for launch in status.failed_launches if launch.details]
    return (f", {coming} on their way" if coming else "") + (f"; the last launch failed: {failed[-1].details}" if failed else "")

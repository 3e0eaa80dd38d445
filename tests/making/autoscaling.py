"""A Ray cluster on this machine whose autoscaler (v2) starts and ends real nodes: a head without CPUs, and workers as they are asked for.

Ray's own `AutoscalingCluster` needs a file that its wheel lacks, and ends every Ray of the machine before it starts.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from making.ports import free_ports

HEAD = "f" * 51 + "00000"  # the id that Ray's provider of pretended nodes gives to the head
RAY = str(Path(sys.executable).parent / "ray")


@dataclass
class Autoscaling:
    """A running cluster."""

    address: str
    env: dict[str, str]
    began: float = field(default_factory=time.monotonic)
    timeline: list[tuple[float, str]] = field(default_factory=list)

    def workers(self) -> int:
        """Worker nodes that stand."""
        from ray.autoscaler.v2.sdk import get_cluster_status

        status = get_cluster_status(self.address)
        return len(status.active_nodes) + len(status.idle_nodes) - 1

    def note(self, what: str) -> None:
        """A line of the timeline: seconds since the cluster was started, and what happened."""
        self.timeline.append((time.monotonic() - self.began, what))
        print(f"{self.timeline[-1][0]:7.1f} s  {what}", flush=True)


@contextmanager
def autoscaling(kinds: dict[str, tuple[dict[str, float], int]], idle_s: float = 6) -> Iterator[Autoscaling]:
    """kinds: name -> (resources of a node, at most so many). A node without work for `idle_s` is ended."""
    gcs, dashboard, agent = free_ports(3)
    empty: dict[str, Any] = {"auth": {}, "docker": {}, "file_mounts": {}, "file_mounts_sync_continuously": False}
    lists = ("initialization_commands", "setup_commands", "head_setup_commands", "worker_setup_commands", "cluster_synced_files")
    empty |= {key: [] for key in (*lists, "head_start_ray_commands", "worker_start_ray_commands", "rsync_exclude", "rsync_filter")}
    provider = "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider"
    config = empty | {
        "cluster_name": "test",
        "max_workers": sum(most for _, most in kinds.values()),
        "upscaling_speed": 100,
        "idle_timeout_minutes": idle_s / 60,
        "provider": {
            "type": "external",
            "module": provider,
            "gcs_address": f"127.0.0.1:{gcs}",
            "head_node_id": HEAD,
            "launch_multiple": True,
        },
        "head_node_type": "ray.head.default",
        "available_node_types": {"ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0}}
        | {name: {"resources": r, "node_config": {}, "min_workers": 0, "max_workers": most} for name, (r, most) in kinds.items()},
    }
    home = Path(tempfile.mkdtemp(prefix="auto-"))  # a path of pytest's own would be too long for the name of a socket
    (home / "autoscaling.json").write_text(json.dumps(config))
    env = {k: v for k, v in os.environ.items() if k not in ("RAY_ADDRESS", "OMP_WAIT_POLICY")} | {
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "RAY_FAKE_CLUSTER": "1",
        "RAY_enable_autoscaler_v2": "1",
        "RAY_CLOUD_INSTANCE_ID": HEAD,
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD,
        "RAY_AUTH_MODE": "disabled",
    }
    command = [RAY, "start", "--head", "--block", "--num-cpus=0", f"--port={gcs}", "--node-ip-address=127.0.0.1", "--disable-usage-stats"]
    command += ["--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={agent}"]
    command += [f"--autoscaling-config={home / 'autoscaling.json'}", f"--temp-dir={home}"]
    with open(home / "head.log", "w") as log:
        process = subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        client = {k: v for k, v in env.items() if not k.startswith(("RAY_CLOUD", "RAY_OVERRIDE", "RAY_FAKE"))}
        found = Autoscaling(f"127.0.0.1:{gcs}", client | {"RAY_ADDRESS": f"127.0.0.1:{gcs}"})
        wait_until_up(found, process, home / "head.log")
        yield found
    finally:
        os.killpg(process.pid, signal.SIGTERM)  # the head and the nodes that its autoscaler began, which are of its group
        time.sleep(2)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        shutil.rmtree(home, ignore_errors=True)


def wait_until_up(found: Autoscaling, process: subprocess.Popen[bytes], log: Path) -> None:
    from ray.exceptions import RpcError

    deadline = time.monotonic() + 90
    while True:
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()
        try:
            if found.workers() == 0:
                return
        except (RpcError, RuntimeError):
            pass
        time.sleep(0.5)

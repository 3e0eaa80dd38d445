"""Tell Ray when the cloud takes this spot node away: `python notice.py aws` (or `gcp`), begun beside `ray start` on such nodes.

Ray does not ask the clouds. Of a node that is drained it knows: nothing new begins there, trainings write a checkpoint and go on without it, and
Serve starts its replicas elsewhere. What the clouds say and when: "Spot Instance interruption notices" of Amazon EC2's guide (two minutes ahead),
"Preemption process" of Compute Engine's (thirty seconds).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from datetime import UTC, datetime
from http.client import HTTPException
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

POLL_S = 2.0  # between two questions to the cloud
HEARD_S = 15.0  # that Ray has to answer, before it is told again
GCP_S = 25.0  # of thirty, some are gone when it is known


def asked(url: str, headers: dict[str, str], method: str = "GET") -> str:
    """What the metadata service answers. Raises OSError, HTTPError of it included."""
    with urlopen(Request(url, headers=headers, method=method), timeout=5) as answer:
        return str(answer.read().decode())


def aws() -> float | None:
    """Seconds that are left to this EC2 instance; None: it is not known to end. Raises OSError."""
    base = os.environ.get("AWS_EC2_METADATA_SERVICE_ENDPOINT", "http://169.254.169.254").rstrip("/")
    token = asked(f"{base}/latest/api/token", {"X-aws-ec2-metadata-token-ttl-seconds": "60"}, "PUT")
    try:
        notice = json.loads(asked(f"{base}/latest/meta-data/spot/instance-action", {"X-aws-ec2-metadata-token": token}))
    except HTTPError as error:
        if error.code == 404:
            return None
        raise
    return (datetime.fromisoformat(notice["time"]) - datetime.now(UTC)).total_seconds()


def gcp() -> float | None:
    """Seconds that are left to this Compute Engine instance; None: it is not known to end. Raises OSError."""
    base = f"http://{os.environ.get('GCE_METADATA_HOST', 'metadata.google.internal')}"
    gone = asked(f"{base}/computeMetadata/v1/instance/preempted", {"Metadata-Flavor": "Google"}).strip() == "TRUE"
    return GCP_S if gone else None


CLOUDS = {"aws": aws, "gcp": gcp}


def drain(left: float) -> bool:
    """Tell the cluster that this node ends in so many seconds. Whether it heard."""
    command = [str(Path(sys.executable).with_name("ray")), "drain-node", "--reason", "DRAIN_NODE_REASON_PREEMPTION"]
    command += ["--reason-message", "a spot node is taken back", "--deadline-remaining-seconds", str(max(1, int(left)))]
    try:
        return subprocess.run(command, timeout=HEARD_S).returncode == 0
    except subprocess.TimeoutExpired:
        return False


def watch(cloud: str) -> None:
    """Wait for the cloud's notice, and pass it on. What cannot be asked is asked again; said once, not every two seconds."""
    said = ""
    while True:
        try:
            left, error = CLOUDS[cloud](), ""
        except (OSError, HTTPException, ValueError, KeyError) as problem:  # not there, cut off, or not what it should be
            left, error = None, f"{cloud}'s metadata service: {problem!r}"
        if error != said:
            print(error or f"{cloud}'s metadata service answers", file=sys.stderr, flush=True)
            said = error
        if left is not None and drain(left):
            return
        time.sleep(POLL_S)


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1] not in CLOUDS:
        sys.exit(f"which cloud's notices? python notice.py {'|'.join(CLOUDS)}, not {' '.join(sys.argv[1:]) or 'nothing'}")
    watch(sys.argv[1])

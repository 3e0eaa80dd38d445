"""Who holds the right to write: a card that is left for others to read."""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from pathlib import Path
from typing import Any


def myself() -> dict[str, Any]:
    """Who this process is, for people; and for processes of the same machine, which can see whether it is alive."""
    named = [Path(sys.argv[0]).name, *(a for a in sys.argv[1:] if not a.startswith("-"))]  # options may hold what is nobody's business
    command = " ".join("retrikt" if name == "__main__.py" else name for name in named)[:200]
    return {"command": command, "host": socket.gethostname(), "pid": os.getpid(), "process": identity(os.getpid())}


def identity(pid: int) -> list[str] | None:
    """Boot, process namespace, number and start of a living process of this user: no two have the same. None: dead, or not to be told on this system."""
    try:
        state, *rest = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
        machine = [Path("/proc/sys/kernel/random/boot_id").read_text().strip(), os.readlink("/proc/self/ns/pid"), str(os.getuid())]
    except OSError:
        return None
    return None if state in "ZX" else [*machine, str(pid), rest[18]]


def dead(card: dict[str, Any]) -> bool:
    """Whether the holder was a process of this machine and user that is no more. Others' may be hidden from us, or out of sight: False."""
    process, mine = card.get("process"), identity(os.getpid())
    return bool(process and mine and process[:3] == mine[:3] and identity(int(process[3])) != process)


def card_of(data: bytes | None) -> dict[str, Any]:
    """What a lease or a lock says; empty where there is none, or it is not to be read."""
    try:
        card = json.loads(data or b"{}")
    except ValueError:
        return {}
    return card if isinstance(card, dict) else {}


def told(card: dict[str, Any]) -> str:
    """A holder in words."""
    if not card.get("pid"):
        return "somebody who did not say who"
    until = f", for now until {card['until']}" if card.get("until") else ""
    return f"`{card.get('command')}` (process {card['pid']} on {card.get('host')}, since {card.get('since')}{until})"


def utc(ahead_s: float = 0.0) -> str:
    """The time of this machine's clock, for people."""
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(time.time() + ahead_s))

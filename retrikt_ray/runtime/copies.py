"""A bounded cache on this machine's disk of folders that are on an object store.

`$TMPDIR/retrikt-UID/` holds a directory for each content. A process that was given one holds a shared lock on it, so that no other removes it; the
kernel drops the lock with the process. When all together are larger than `RETRIKT_CACHE_GB` (20 by default), those go that nobody holds, the one that
was asked for longest ago first. A process that lives long lets go of what it has neither open nor mapped and has not asked for lately.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import tempfile
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from retrikt_ray.runtime.settings import ConfigError

VARIABLE, DEFAULT_GB = "RETRIKT_CACHE_GB", "20"
LATELY_S = 600.0  # a path that was handed out may still be opened for so long
held: dict[str, int] = {}  # of this process: key -> the file that is locked
threads = threading.Lock()  # of `held`


def directory(key: str, fill: Callable[[Path], None], whole: Callable[[Path], bool]) -> Path:
    """The directory of a content: the one that is there, if it is whole, else a new one that `fill` has filled.

    Raises ConfigError where others could write to the cache, or its limit is no number.
    """
    cache = root()
    target, limit = cache / key, limit_bytes()
    with threads:
        if key not in held:
            held[key] = opened(cache / f"{key}.held")
            fcntl.flock(held[key], fcntl.LOCK_SH)
        os.utime(held[key])  # when it was asked for
    filling = opened(cache / f"{key}.filling")
    try:
        fcntl.flock(filling, fcntl.LOCK_EX)  # one process of a machine copies, others wait for it
        if not (target.exists() and whole(target)):
            for left in cache.glob(f"{key}.tmp-*"):  # of a process that died
                shutil.rmtree(left)
            aside = cache / f"{key}.tmp-{uuid.uuid4().hex[:8]}"
            try:
                aside.mkdir()
                fill(aside)
                shutil.rmtree(target, ignore_errors=True)
                aside.rename(target)
            finally:
                shutil.rmtree(aside, ignore_errors=True)
            evict(cache, limit)
    finally:
        os.close(filling)
    return target


def root() -> Path:
    cache = Path(tempfile.gettempdir()) / f"retrikt-{os.getuid()}"
    cache.mkdir(mode=0o700, exist_ok=True)
    if cache.stat().st_uid != os.getuid() or cache.stat().st_mode & 0o022:
        raise ConfigError(f"{cache} can be written by others, and holds copies of files on object stores; remove it or set TMPDIR")
    return cache


def limit_bytes() -> float:
    text = os.environ.get(VARIABLE, DEFAULT_GB)
    try:
        return float(text) * 1e9
    except ValueError:
        raise ConfigError(f"{VARIABLE}={text!r}: expected a number of gigabytes") from None


def opened(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)


def size(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def evict(cache: Path, limit: float) -> None:
    """Remove what nobody holds until the rest is within the limit; the locks' empty files stay, since others may be about to lock them."""
    sizes = {path: size(path) for path in cache.iterdir() if path.is_dir()}
    if sum(sizes.values()) <= limit:
        return
    let_go(cache)

    def asked(path: Path) -> float:
        lock = cache / f"{path.name.split('.')[0]}.held"
        return lock.stat().st_mtime if lock.exists() else 0.0

    for path in sorted(sizes, key=asked):
        key, _, half = path.name.partition(".")
        lock = opened(cache / f"{key}.{'filling' if half else 'held'}")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            continue
        else:
            shutil.rmtree(path)
            del sizes[path]
        finally:
            os.close(lock)
        if sum(sizes.values()) <= limit:
            return


compared: dict[str, tuple[object, ...]] = {}  # files of copies that this process has read and found right, as they were then


def differs(copy: Path, wanted: dict[str, Any]) -> str | None:
    """The first file of a manifest ({name: {sha256, bytes}}) that a copy does not hold as it should be. What was compared is read again only if it was touched."""
    for name, want in wanted.items():
        path = copy / name
        if not path.exists() or path.stat().st_size != want["bytes"]:
            return name
        found = path.stat()
        state = (want["sha256"], found.st_ino, found.st_mtime_ns, found.st_ctime_ns)
        if compared.get(str(path)) != state:
            with path.open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != want["sha256"]:
                    return name
            compared[str(path)] = state
    return None


def let_go(cache: Path) -> None:
    """Unlock what this process neither uses nor was given lately."""
    with threads:
        for key, lock in list(held.items()):
            if time.time() - os.fstat(lock).st_mtime > LATELY_S and not in_use(f"{cache}/{key}/"):
                os.close(held.pop(key))


def in_use(path: str) -> bool:
    """Whether this process has a file below the path open or mapped; True where the system does not tell."""
    if not os.path.exists("/proc/self/maps"):
        return True
    if path in Path("/proc/self/maps").read_text():
        return True
    for number in os.listdir("/proc/self/fd"):
        try:
            if os.readlink(f"/proc/self/fd/{number}").startswith(path):
                return True
        except FileNotFoundError:  # closed meanwhile
            continue
    return False

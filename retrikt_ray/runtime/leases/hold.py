"""One writer at a time: a driver of a run, an editor of a store. On a local disk by a lock of the kernel, on S3 by a lease.

What was left out on purpose: gs:// and az://, whose fsspec clients have no public way to say "if it is still the one that I read". A line says that
nobody keeps others off.
"""

from __future__ import annotations

import fcntl
import functools
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from retrikt_ray.runtime.folders import S3, Folder, as_json
from retrikt_ray.runtime.leases.conditional import Changed
from retrikt_ray.runtime.leases.holder import card_of, myself, told, utc
from retrikt_ray.runtime.leases.lease import LOST, Lease, LeaseHeld, LeaseLost, Right
from retrikt_ray.runtime.progress import console

RUN, KNOWLEDGE = "run", "knowledge"  # what there is to hold
FILES = frozenset(f"{before}{what}{after}" for what in (RUN, KNOWLEDGE) for before, after in ((".", ".lock"), ("", ".lease.json")))


@contextmanager
def hold(folder: Folder, what: str, wait_s: float = 0.0) -> Iterator[Right]:
    """Hold the right to write. Raises LeaseHeld where somebody else has it for longer than wait_s, LeaseLost where it is lost meanwhile."""
    if folder.is_local:
        with locked(Path(folder.uri) / f".{what}.lock", wait_s):
            yield Right()
    elif folder.uri.startswith(S3):
        with leased(Lease(folder, f"{what}.lease.json"), wait_s) as lease:
            yield lease
    else:
        if not folder.uri.startswith("memory://"):  # which no other process sees
            warn(f"{folder}: there are no leases on a place of this kind")
        yield Right()


@contextmanager
def locked(path: Path, wait_s: float) -> Iterator[None]:
    """Hold a lock of the kernel, which drops it when its holder dies, however it dies."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+b") as handle:
        until = time.monotonic() + wait_s
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > until:
                    handle.seek(0)
                    raise LeaseHeld(f"{path.parent} is held by {told(card_of(handle.read()))}. Wait for it to end, or end it") from None
                time.sleep(0.05)
        handle.truncate(0)
        handle.write(as_json(myself() | {"since": utc()}))
        handle.flush()
        yield


@contextmanager
def leased(lease: Lease, wait_s: float) -> Iterator[Lease]:
    """Hold a lease, with a thread that keeps it."""
    lease.acquire(wait_s)
    main = threading.current_thread() is threading.main_thread()
    before = signal.signal(LOST, signal.default_int_handler) if main else None
    keeper = threading.Thread(target=lease.keep, args=(main,), daemon=True)
    keeper.start()
    try:
        refuses(lease)
        yield lease
    except BaseException as error:  # KeyboardInterrupt: how the main thread learns of it
        if lease.lost and not isinstance(error, LeaseLost):
            lease.check()
        raise
    finally:
        lease.ended.set()
        keeper.join()
        if main:
            signal.signal(LOST, before)
        lease.release()


_asked: set[str] = set()  # buckets


def refuses(lease: Lease) -> None:
    """Say so where a store does not refuse what it should. Asked once for each bucket, by writes of the lease that was just acquired."""
    bucket = "/".join(lease.folder.uri.split("/")[:3])
    if bucket in _asked:
        return
    _asked.add(bucket)
    for header, tag in (("If-None-Match", None), ("If-Match", '"00000000000000000000000000000000"')):
        with lease.lock:
            mine, lease.tag = lease.tag, tag
            try:
                lease.put()
            except Changed:
                lease.tag = mine
            else:
                warn(f"{bucket}: this store does not heed {header}, so that leases keep nobody off")


@functools.cache
def warn(what: str) -> None:
    """Once."""
    console.print(f"{what}: that no two processes write at a time is yours to ensure", markup=False)

"""The right to write below a run directory: held by the kernel's grace, or by a lease on S3.

A lease (Gray and Cheriton, SOSP 1989) is an object that says who holds it. It is created with `If-None-Match: *` and from then on only replaced, with
`If-Match: <its ETag>`, so that of two who try one succeeds; its holder replaces it every `BEAT_S`, and one that ends leaves it there, marked as free.
No clocks of two machines are compared. Who wants it watches, by a clock of its own, and takes it over when it has not changed for `LEASE_S`; its holder,
which may only have been paused, does not trust a lease that it renewed more than `TRUST_S` ago, and asks the store before it writes.

A request may still be on its way when the lease of its sender has ended. So what makes work visible to others (the manifest of a stage, the log of the
edits) is written on the condition that what it replaces is what its writer has read: of a holder and one that was, one is refused.
"""

from __future__ import annotations

import signal
import threading
import time
import uuid
from typing import Any

from retrikt_ray.runtime.folders import Folder, as_json
from retrikt_ray.runtime.leases import conditional
from retrikt_ray.runtime.leases.conditional import Changed
from retrikt_ray.runtime.leases.holder import card_of, dead, myself, told, utc
from retrikt_ray.runtime.progress import console
from retrikt_ray.runtime.settings import ConfigError

LEASE_S = 60.0  # a lease that has not changed for so long may be taken over
TRUST_S = 40.0  # its holder believes in it for so long: what it sends then has the difference to arrive
BEAT_S = 10.0  # between two renewals
POLL_S = 0.5  # between two looks at somebody else's
SAY_S = 2.0  # of waiting, before it is said
LOST = signal.SIGUSR1  # not SIGINT: what a script starts in the background ignores it, and Ray Train has a handler of its own for it


class LeaseHeld(ConfigError):
    """Somebody else has the right to write. The text says who, and since when."""


class LeaseLost(ConfigError):
    """This process had the right to write, and somebody else has it now, or wrote meanwhile. What is refused so is not written."""


class Right:
    """The right to write where the kernel sees to it that nobody else has it, or nobody does."""

    mark = ""  # in names of files that are not to be written by two

    def check(self) -> None:
        """Raises LeaseLost where it is this process's no more. To be called before what cannot be undone."""

    def read(self, folder: Folder, name: str) -> tuple[bytes | None, str | None]:
        """A file, None where it is not there, and its tag: what `write` and `remove` are to find."""
        return folder.read_if_there(name), None

    def write(self, folder: Folder, name: str, data: bytes, tag: str | None) -> str | None:
        """Write in the place of what was read with the tag (None: of nothing); the new tag. Raises LeaseLost, and writes nothing, where another file is there."""
        folder.write_bytes(name, data)
        return None

    def remove(self, folder: Folder, name: str, tag: str | None) -> None:
        """Remove what was read with the tag. Raises as `write` does."""
        folder.remove(name)

    def publish(self, folder: Folder, name: str, data: bytes) -> None:
        """Write what is not there. What an earlier holder sent that came late gives way to it. Raises as `write` does."""
        folder.write_bytes(name, data)


class Lease(Right):
    """The right to write by an object on S3. Threads may share it."""

    def __init__(self, folder: Folder, name: str) -> None:
        """Not held yet. name: of the object."""
        self.folder, self.name, self.id = folder, name, uuid.uuid4().hex[:12]
        self.mark = f"-{self.id}"
        self.card: dict[str, Any] = {"holder": self.id, **myself(), "beat": 0}
        self.tag: str | None = None  # of the object as it was seen last
        self.trusted = 0.0  # until then, by `now`
        self.lost = False
        self.lock = threading.Lock()  # the thread that keeps it renews it, and so do checks
        self.ended = threading.Event()

    def __str__(self) -> str:
        return f"{self.folder}/{self.name}"

    # having it

    def put(self, **more: Any) -> None:
        """Replace what was seen last by a card of mine. Raises Changed where something else is there."""
        began = now()
        card = self.card | more | {"beat": self.card["beat"] + 1, "until": utc(LEASE_S)}
        self.tag = conditional.put(self.folder, self.name, as_json(card), self.tag)
        self.card, self.trusted = card, began + TRUST_S

    def acquire(self, wait_s: float) -> None:
        """Take it when it is free, or its holder dead. Raises LeaseHeld where a holder is seen to be at work after wait_s."""
        began = since = now()
        seen: list[str | None] = []  # the first tag, and the last one where it changed
        said = False
        while True:
            data, tag = conditional.get(self.folder, self.name)
            card = card_of(data)
            if not seen or tag != seen[-1]:
                seen, since = [*seen[:1], tag], now()
            if data is None or card.get("free") or dead(card) or now() - since > LEASE_S:
                self.tag = tag
                try:
                    self.put(since=utc())
                    return
                except Changed:  # somebody was first
                    continue
            if now() - began > wait_s and len(seen) > 1:
                raise LeaseHeld(
                    f"{self.folder} is held by {told(card)}. Wait for it to end, or end it; where it died, it is free {LEASE_S:.0f} s later"
                )
            if not said and now() - began > SAY_S:
                console.print(f"waiting for {told(card)}, which holds {self.folder}", markup=False)
                said = True
            time.sleep(min(POLL_S, BEAT_S / 4))

    def renew(self) -> None:
        """Raises LeaseLost where somebody else has it."""
        with self.lock:
            for _ in range(2):
                try:
                    self.put()
                    return
                except Changed:
                    data, tag = conditional.get(self.folder, self.name)
                    if card_of(data).get("holder") != self.id:
                        break
                    self.tag = tag  # the answer to an earlier request of mine was lost
            self.lost = True
        raise self.loss(f"the lease {self} was lost")

    def keep(self, main: bool) -> None:
        """Renew it until it is released. main: what is done under it is done in the main thread, which is interrupted where it is lost."""
        while not self.ended.wait(BEAT_S):
            try:
                if self.lost:
                    return  # a check was first to see it
                self.renew()
            except LeaseLost:
                if main and not self.ended.is_set():
                    signal.pthread_kill(threading.main_thread().ident or 0, LOST)  # also out of a call that waits
                return
            except OSError as error:  # the store cannot be reached: `check` sees whether that matters
                console.print(f"cannot renew the lease {self}: {error}", markup=False)

    def release(self) -> None:
        """Leave it to others."""
        with self.lock:
            try:
                if not self.lost:
                    self.put(free=True)
            except Changed:
                self.lost = True
            except OSError as error:
                console.print(f"cannot release the lease {self}, which ends {LEASE_S:.0f} s from now: {error}", markup=False)

    def loss(self, what: str) -> LeaseLost:
        """The error that tells what happened, and who has the right to write now."""
        holder = card_of(conditional.get(self.folder, self.name)[0])
        whose = f"it is held by {told(holder)}"
        if holder.get("holder") == self.id:
            whose = "it is held by this process: the last request of an earlier holder came late"
        elif not holder or holder.get("free"):
            whose = f"it was held by {told(holder)}, and is free"
        return LeaseLost(f"{what}: {whose}. What this process had not written yet is not written; run the command again")

    # what it is for

    def check(self) -> None:
        if self.lost:
            raise self.loss(f"the lease {self} was lost")
        if now() > self.trusted:
            self.renew()

    def read(self, folder: Folder, name: str) -> tuple[bytes | None, str | None]:
        return conditional.get(folder, name)

    def write(self, folder: Folder, name: str, data: bytes, tag: str | None) -> str | None:
        self.check()
        try:
            return conditional.put(folder, name, data, tag)
        except Changed:
            raise self.loss(f"{folder}/{name} was changed by another process") from None

    def remove(self, folder: Folder, name: str, tag: str | None) -> None:
        self.check()
        try:
            conditional.delete(folder, name, tag)
        except Changed:
            raise self.loss(f"{folder}/{name} was changed by another process") from None

    def publish(self, folder: Folder, name: str, data: bytes) -> None:
        self.check()
        try:
            conditional.put(folder, name, data, None)
        except Changed:
            self.renew()  # which only its holder can
            self.write(folder, name, data, conditional.get(folder, name)[1])
        self.check()  # else it may have arrived after somebody took over, and will have to give way


def now() -> float:
    """Seconds, by a clock that goes on while the machine is suspended."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))

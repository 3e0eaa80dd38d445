"""The right to write: one holder at a time, told to others, taken over from the dead, and worth nothing to who lost it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from retrikt_ray.runtime import artifacts
from retrikt_ray.runtime.folders import Folder
from retrikt_ray.runtime.leases import conditional, hold, lease
from retrikt_ray.runtime.leases.conditional import Changed
from retrikt_ray.runtime.leases.hold import RUN
from retrikt_ray.runtime.leases.holder import card_of, dead, identity, myself
from retrikt_ray.runtime.leases.lease import LOST, Lease, LeaseHeld, LeaseLost

NAME = "run.lease.json"


@pytest.fixture
def place(s3: str, monkeypatch: pytest.MonkeyPatch) -> Folder:
    """A folder on S3, where a lease lasts a second."""
    for name, seconds in (("LEASE_S", 1.0), ("TRUST_S", 0.6), ("BEAT_S", 0.2), ("POLL_S", 0.05), ("SAY_S", 0.3)):
        monkeypatch.setattr(lease, name, seconds)
    return Folder.at(f"{s3}/leases-{uuid.uuid4().hex[:8]}")


def held(place: Folder) -> Lease:
    """A lease whose holder is paused from now on: nothing renews it."""
    found = Lease(place, NAME)
    found.acquire(0)
    return found


def card(place: Folder) -> dict[str, Any]:
    return card_of(conditional.get(place, NAME)[0])


def elsewhere(place: Folder) -> None:
    """Let the holder be a process of another machine, of which nobody here can see whether it is alive."""
    data, tag = conditional.get(place, NAME)
    conditional.put(
        place, NAME, json.dumps(card_of(data) | {"process": ["boot", "pid", "0", "1", "1"], "host": "there", "pid": 1}).encode(), tag
    )


# -- conditional requests ----------------------------------------------------------------------------------------------


def test_an_object_is_written_only_over_what_was_read(place: Folder) -> None:
    assert conditional.get(place, "x") == (None, None)
    first = conditional.put(place, "x", b"1", None)
    with pytest.raises(Changed):
        conditional.put(place, "x", b"2", None)
    second = conditional.put(place, "x", b"3", first)
    with pytest.raises(Changed):
        conditional.put(place, "x", b"4", first)
    assert conditional.get(place, "x") == (b"3", second)
    with pytest.raises(Changed):
        conditional.delete(place, "x", first)
    conditional.delete(place, "x", second)
    with pytest.raises(Changed):
        conditional.put(place, "x", b"5", second)  # what is gone is not what was read
    assert conditional.get(place, "x") == (None, None)
    conditional.delete(place, "x", second)  # it is not there: as it should be


def test_a_request_that_the_client_sent_twice_has_succeeded(place: Folder) -> None:
    first = conditional.put(place, "x", b"1", None)
    assert conditional.put(place, "x", b"1", None) == first
    second = conditional.put(place, "x", b"2", first)
    assert conditional.put(place, "x", b"2", first) == second


def test_of_many_at_once_one_succeeds(place: Folder) -> None:
    won: list[int] = []

    def one(number: int) -> None:
        try:
            conditional.put(place, "x", str(number).encode(), None)
            won.append(number)
        except Changed:
            pass

    threads = [threading.Thread(target=one, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [str(n).encode() for n in won] == [conditional.get(place, "x")[0]]


# -- holding -----------------------------------------------------------------------------------------------------------


def test_the_second_on_a_local_disk_is_told_who_is_first(tmp_path: Path) -> None:
    folder, who = Folder.at(tmp_path), rf"is held by `.*` \(process {os.getpid()} on .*, since .* UTC\)\. Wait for it to end, or end it"
    with hold.hold(folder, RUN):
        with pytest.raises(LeaseHeld, match=who), hold.hold(folder, RUN, 0.1):
            pass
        with hold.hold(folder, hold.KNOWLEDGE) as other:  # another right
            other.check()
    with hold.hold(folder, RUN):
        pass
    assert set(folder.files()) <= hold.FILES


def test_the_second_on_an_object_store_is_told_who_is_first_and_until_when(place: Folder) -> None:
    with hold.hold(place, RUN) as right:
        began = time.monotonic()
        found = card(place)
        who = rf"{place} is held by `.*` \(process {os.getpid()} on .*, since {found['since']}, for now until .* UTC\)"
        with pytest.raises(LeaseHeld, match=who), hold.hold(place, RUN):
            pass
        assert time.monotonic() - began < 0.9  # its renewals show that it is alive
        with hold.hold(place, hold.KNOWLEDGE):
            pass
        right.check()
        time.sleep(1.2)
        right.check()  # kept
        assert card(place)["beat"] > found["beat"] + 3 and card(place)["since"] == found["since"]
    assert card(place)["free"]
    began = time.monotonic()
    with hold.hold(place, RUN):
        assert time.monotonic() - began < 0.5 and "free" not in card(place)


def test_who_waits_gets_it_when_it_is_free(place: Folder) -> None:
    got: list[float] = []

    def wait() -> None:
        with hold.hold(place, RUN, 5):
            got.append(time.monotonic())

    waiting = threading.Thread(target=wait)
    with hold.hold(place, RUN):
        waiting.start()
        time.sleep(1.5)  # longer than a lease lasts
        assert not got
        ended = time.monotonic()
    waiting.join()
    assert 0 < got[0] - ended < 0.5


def test_a_holder_elsewhere_that_shows_no_life_is_waited_for_as_long_as_a_lease_lasts(place: Folder) -> None:
    first = held(place)
    elsewhere(place)
    began = time.monotonic()
    with hold.hold(place, RUN) as right:
        assert 1 <= time.monotonic() - began < 1.5
        assert isinstance(right, Lease) and right.id != first.id == first.card["holder"]


def test_a_dead_process_of_this_machine_is_not_waited_for(place: Folder) -> None:
    code = f"""
import os, signal
from retrikt_ray.runtime.folders import Folder
from retrikt_ray.runtime.leases.lease import Lease
Lease(Folder.at({place.uri!r}), {NAME!r}).acquire(0)
os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == -9
    began = time.monotonic()
    with hold.hold(place, RUN):
        assert time.monotonic() - began < 0.5


def test_who_is_dead(monkeypatch: pytest.MonkeyPatch) -> None:
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    theirs = {"process": identity(process.pid)}
    assert not dead(theirs) and not dead(myself()) and not dead({})
    process.kill()
    while Path(f"/proc/{process.pid}/stat").read_text().rpartition(") ")[2][0] != "Z":
        time.sleep(0.01)
    assert dead(theirs)  # nobody has asked yet how it ended
    process.wait()
    assert dead(theirs)
    assert theirs["process"] is not None
    for i in range(3):  # of another machine, container or user
        assert not dead({"process": [*theirs["process"][:i], "another", *theirs["process"][i + 1 :]]})
    mine = identity(os.getpid())
    assert mine is not None and dead({"process": [*mine[:4], "1"]})  # a number that was given to another process


def test_what_is_told_leaves_options_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/x/default_worker.py", "--redis-password=secret", "-k", "run"])
    assert myself()["command"] == "default_worker.py run"


# -- losing it ---------------------------------------------------------------------------------------------------------


def test_a_holder_that_was_paused_writes_nothing_more(place: Folder) -> None:
    """It is told who has the lease; and what that one wrote stays."""
    first = held(place)
    tag = first.write(place, "log", b"0", None)
    elsewhere(place)
    with hold.hold(place, RUN) as right:
        who = rf"it is held by `.*` \(process {os.getpid()} on .*, since .*, for now until .* UTC\)"
        with pytest.raises(LeaseLost, match=who):
            first.check()
        for call in (
            lambda: first.write(place, "log", b"late", tag),
            lambda: first.remove(place, "log", tag),
            lambda: first.publish(place, "new", b"late"),
        ):
            with pytest.raises(LeaseLost, match=who):
                call()
        right.write(place, "log", b"1", tag)
    first.release()
    assert card(place)["free"] and card(place)["holder"] != first.id
    assert place.read_bytes("log") == b"1" and not place.exists("new")


def test_a_request_that_was_on_its_way_when_the_lease_ended_is_refused(place: Folder) -> None:
    first = held(place)
    tag = first.write(place, "log", b"0", None)
    elsewhere(place)
    with hold.hold(place, RUN) as right:
        right.write(place, "log", b"1", tag)
        first.trusted = lease.now() + 60  # it had asked just before
        with pytest.raises(LeaseLost, match=r"log was changed by another process: it is held by"):
            first.write(place, "log", b"late", tag)
        with pytest.raises(LeaseLost, match="log was changed"):
            first.remove(place, "log", tag)
        right.publish(place, "new", b"1")
        with pytest.raises(LeaseLost):
            first.publish(place, "new", b"late")
    assert place.read_bytes("log") == b"1" == place.read_bytes("new")


def test_what_came_late_gives_way_and_its_sender_is_told(place: Folder) -> None:
    """Sent under the lease, it arrives after the lease was taken over, and before anything is there."""
    first = held(place)
    elsewhere(place)
    with hold.hold(place, RUN) as right:
        first.trusted = lease.now() + 60
        check = first.check
        asked: list[None] = []

        def late() -> None:
            if asked:
                first.trusted = 0
            asked.append(None)
            check()

        first.check = late  # type: ignore[method-assign]
        with pytest.raises(LeaseLost):
            first.publish(place, "manifest.json", b"late")
        assert place.read_bytes("manifest.json") == b"late"
        right.publish(place, "manifest.json", b"mine")
        assert place.read_bytes("manifest.json") == b"mine"


def test_an_answer_that_was_lost_costs_nobody_the_lease(place: Folder) -> None:
    mine = held(place)
    tag = mine.tag
    mine.renew()
    mine.tag = tag  # as if that had not been answered
    mine.renew()
    assert mine.tag == conditional.get(place, NAME)[1] and not mine.lost


@pytest.fixture
def background() -> Iterator[None]:
    """As in a process that a script started in the background: Ctrl-C is not for it."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    yield
    signal.signal(signal.SIGINT, before)


def test_work_in_the_main_thread_ends_when_the_lease_is_lost(place: Folder, background: None) -> None:
    began = time.monotonic()
    with pytest.raises(LeaseLost, match="it is held by `somebody`"), hold.hold(place, RUN):
        tag = None
        while tag is None:  # its thread renews it meanwhile
            try:
                tag = conditional.put(
                    place, NAME, json.dumps({"holder": "x", "command": "somebody", "pid": 1}).encode(), conditional.get(place, NAME)[1]
                )
            except Changed:
                continue
        time.sleep(20)
    assert time.monotonic() - began < 2
    assert signal.getsignal(LOST) is signal.SIG_DFL  # as it was


def test_an_artifact_is_sealed_by_who_holds_the_run(place: Folder) -> None:
    """The one that was: between its files and its seal the other took over, and began anew."""
    folder = place / "generated"
    keys: dict[str, Any] = {"stage": "generate", "config": {}, "inputs": {}, "seed": 0, "started": time.time()}
    first = held(place)
    artifacts.open_draft(folder, "f1", first)
    folder.write_bytes("a", b"first")
    elsewhere(place)
    with hold.hold(place, RUN) as right:
        artifacts.open_draft(folder, "f2", right)
        with pytest.raises(LeaseLost):
            artifacts.seal(folder, fingerprint="f1", right=first, **keys)
        with pytest.raises(LeaseLost):
            artifacts.open_draft(folder, "f3", first)
        folder.write_bytes("b", b"second")
        artifacts.seal(folder, fingerprint="f2", right=right, **keys)
        first.trusted, first.lost = lease.now() + 60, False  # as if it had asked just before
        with pytest.raises(LeaseLost):
            first.publish(folder, "manifest.json", b"late")
    made = artifacts.check(folder, deep=True)
    assert made.fingerprint == "f2" and list(made.files) == ["b"]


# -- where there are no leases -----------------------------------------------------------------------------------------


def test_a_place_that_cannot_be_guarded_is_told(place: Folder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    hold.warn.cache_clear()
    for _ in range(2):
        with hold.hold(Folder.at("gs://bucket/run"), RUN) as right:
            right.check()
    with hold.hold(Folder.at("memory://alone/run"), RUN):
        pass
    told = "gs://bucket/run: there are no leases on a place of this kind: that no two processes write at a time is yours to ensure\n"
    assert capsys.readouterr().out == told

    def heedless(folder: Folder, name: str, data: bytes, tag: str | None) -> str:
        folder.write_bytes(name, data)
        return str(conditional.get(folder, name)[1])

    monkeypatch.setattr(hold, "_asked", set())
    monkeypatch.setattr(conditional, "put", heedless)
    with hold.hold(place, RUN):
        pass
    out = capsys.readouterr().out
    assert "s3://runs: this store does not heed If-None-Match" in out and "this store does not heed If-Match" in out

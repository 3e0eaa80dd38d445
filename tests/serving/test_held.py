"""Runs that a replica holds beside its own: given up when nobody is at work with them, and not opened for every request that they fail."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from making.serving_stub import Stub
from making.tiny_run import make_run

from retrikt_ray.runtime.folders import Folder
from retrikt_ray.serving import held
from retrikt_ray.serving.api.reading import Refusal
from retrikt_ray.serving.held import Held, several


@pytest.mark.parametrize(("deadline_s", "waits"), [(5.0, True), (0.2, False)])
def test_a_run_is_given_up_once_it_has_answered(tmp_path: Path, deadline_s: float, waits: bool) -> None:
    run = make_run(tmp_path / "mine")
    found = Held(run, "mine", Stub(deadline_s=deadline_s))
    worker, inside, leave = found.endpoint.opened.worker, threading.Event(), asyncio.Event()

    async def app(*_: Any) -> None:
        inside.set()
        await leave.wait()

    async def work() -> bool:
        found.app = app  # type: ignore[assignment]
        asked = asyncio.ensure_future(found({}, None, None))  # type: ignore[arg-type]
        await asyncio.sleep(0)
        assert inside.is_set()
        ending = asyncio.ensure_future(asyncio.to_thread(found.__del__))
        await asyncio.sleep(0.5)
        still = not worker._shutdown  # type: ignore[attr-defined]
        leave.set()
        await asyncio.gather(asked, ending)
        return still

    assert asyncio.run(work()) is waits
    assert worker._shutdown and found.endpoint.closed.is_set()  # type: ignore[attr-defined]
    began = time.monotonic()
    found.__del__()  # Python's own comes later
    assert time.monotonic() - began < held.GRACE_S


def test_a_run_that_cannot_be_opened_is_not_tried_for_each_request(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    make_run(tmp_path / "mine")
    (tmp_path / "mine" / "student" / "config.json").write_text("{}")
    tried: list[str] = []

    def multiplexed(**_: Any) -> Callable[[Any], Any]:
        def counted(load: Any) -> Any:
            async def call(name: str) -> Any:
                tried.append(name)
                return await load(name)

            return call

        return counted

    monkeypatch.setattr("ray.serve.multiplexed", multiplexed)
    hold = several(Stub(), Folder.at(tmp_path))
    for _ in range(3):
        with pytest.raises(Refusal, match=r"the run mine cannot be opened: runs/mine/student/config\.json has 2 bytes") as refused:
            asyncio.run(hold("mine"))  # type: ignore[arg-type]
        assert refused.value.status_code == 503
    assert tried == ["mine"]
    with pytest.raises(Refusal, match="there is no run"):
        asyncio.run(hold("other"))  # type: ignore[arg-type]
    assert tried == ["mine"]

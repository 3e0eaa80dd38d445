"""The page in a real browser, as people use it: predict, correct, see it change, undo, remove; on a phone and on a desk."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import shutil
import subprocess
from collections.abc import Awaitable, Callable, Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import aiohttp
import httpx
import pytest
from making.serving_local import listening, replica
from making.tiny_run import make_run

from retrikt_ray.serving.api.routes import build_api
from retrikt_ray.serving.server import free_port

NAMES = ("chromium", "chromium-browser", "google-chrome")
pytestmark = pytest.mark.slow
KEY = "write-key-of-20-chars"


class Page:
    """A tab of the browser, over its DevTools protocol."""

    def __init__(self, socket: Any) -> None:
        self.socket, self.sent = socket, 0

    async def call(self, method: str, **params: Any) -> Any:
        self.sent += 1
        await self.socket.send_json({"id": self.sent, "method": method, "params": params})
        while True:
            answer = json.loads((await self.socket.receive()).data)
            if answer.get("id") == self.sent:
                return answer["result"]

    async def js(self, expression: str) -> Any:
        found = await self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        return found["result"].get("value")

    async def until(self, expression: str) -> None:
        for _ in range(200):
            if await self.js(expression):
                return
            await asyncio.sleep(0.05)
        raise AssertionError(f"{expression} did not become true: {await self.js('document.body.innerText')}")

    async def open(self, url: str, width: int) -> None:
        await self.call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 500)
        await self.call("Page.navigate", url=url)
        await self.until("document.readyState == 'complete' && document.body.children.length > 0")

    async def picture(self, path: Path) -> None:
        """The whole page as a PNG file."""
        found = await self.call("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(found["data"]))

    async def text(self, selector: str) -> str:
        return str(await self.js(f"(document.querySelector({selector!r}) || {{}}).textContent || ''"))

    async def click(self, selector: str) -> None:
        assert await self.js(f"!document.querySelector({selector!r}).closest('[hidden]')"), f"{selector} is hidden"
        await self.js(f"document.querySelector({selector!r}).click()")


@pytest.fixture(scope="module")
def browse(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[Callable[[Page], Awaitable[None]]], None]]:
    """Runs a coroutine with a fresh browser's page. Without a browser the tests fail: nothing else shows that the page works."""
    browser = next(filter(None, map(shutil.which, NAMES)), None)
    assert browser, f"these tests need a browser: install one of {', '.join(NAMES)}"
    port, home = free_port(), tmp_path_factory.mktemp("browser")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", f"--remote-debugging-port={port}", f"--user-data-dir={home}", "about:blank"]
    process = subprocess.Popen([browser, *flags], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    async def work(use: Callable[[Page], Awaitable[None]]) -> None:
        tabs: Any = []
        for _ in range(200):
            try:
                tabs = httpx.get(f"http://127.0.0.1:{port}/json").json()
                break
            except httpx.TransportError:
                await asyncio.sleep(0.1)
        address = next(tab["webSocketDebuggerUrl"] for tab in tabs if tab["type"] == "page")
        async with aiohttp.ClientSession() as session, session.ws_connect(address, max_msg_size=0) as socket:
            await use(Page(socket))

    yield lambda use: asyncio.run(work(use))
    process.terminate()
    process.wait(30)


AXE = (files("axe_core_python") / "axe.min.js").read_text(encoding="utf-8")


async def faults(page: Page) -> list[str]:
    """What axe-core finds wrong with the page as it stands: the rule, how bad it is, and where."""
    await page.js(AXE + "; 0")
    found = await page.js(
        "axe.run().then(found => JSON.stringify(found.violations.map(v => [v.id, v.impact, v.nodes.map(n => n.target.join(' '))])))"
    )
    return [f"{impact}: {rule} at {', '.join(places)}" for rule, impact, places in json.loads(found)]


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [390, 1280])
def test_axe_finds_nothing(tmp_path: Path, browse: Any, width: int, dark: bool) -> None:
    async def look(page: Page, name: str) -> None:
        assert await faults(page) == [], name
        assert not await page.js("document.documentElement.scrollWidth > innerWidth"), name
        if os.environ.get("SCREENSHOTS"):
            await page.picture(Path(os.environ["SCREENSHOTS"]) / f"{name}-{width}{'-dark' * dark}.png")

    async def use(page: Page) -> None:
        await page.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}])
        await page.open(url, width)
        await look(page, "empty")
        await page.open(f"{url}/?text=a+zebra+film", width)
        await page.until("!document.getElementById('result').hidden")
        await look(page, "answer")
        await page.click("#teach-go")
        await page.until("document.getElementById('done-text').textContent.startsWith('Taught.')")
        await page.js("document.querySelectorAll('details').forEach(d => d.open = true)")
        await look(page, "taught")
        await page.js("document.getElementById('text').value = 'x'.repeat(30000); document.querySelector('form').requestSubmit()")
        await page.until("document.getElementById('error-text').textContent != ''")
        await look(page, "error")
        await page.open(f"{url}/docs", width)
        await page.until("document.querySelectorAll('details').length > 20")
        await page.js("document.querySelectorAll('details').forEach(d => d.open = true)")
        await look(page, "docs")

    with replica(str(make_run(tmp_path / "run"))) as opened, listening(build_api(opened.endpoint)) as url:
        browse(use)


def test_axe_would_find_something(tmp_path: Path, browse: Any) -> None:
    async def use(page: Page) -> None:
        await page.open(url, 390)
        await page.js("document.querySelector('label').remove()")
        assert any("label" in fault for fault in await faults(page))

    with replica(str(make_run(tmp_path / "run"))) as opened, listening(build_api(opened.endpoint)) as url:
        browse(use)


@pytest.mark.parametrize("width", [390, 1280])
def test_an_answer_is_corrected_and_the_correction_undone(tmp_path: Path, browse: Any, width: int) -> None:
    async def use(page: Page) -> None:
        await page.open(f"{url}/?text=a+zebra+film", width)
        await page.until("!document.getElementById('result').hidden")
        before = await page.text("#answer")
        label = await page.js("document.getElementById('should').value")  # the second best is offered
        assert (await page.text("#answer .bar .name")) != label
        assert "ms, with all" in await page.text("#how")
        await page.click("#teach-go")
        await page.until("document.getElementById('done-text').textContent.startsWith('Taught.')")
        assert await page.text("#answer") != before
        assert "added" in await page.text("#dense-rows li:first-child") and label in await page.text("#dense-rows li:first-child")
        assert (await page.text("#added-count")).startswith("1 row, newest first; version 1")
        assert not await page.js("document.documentElement.scrollWidth > innerWidth")
        await page.click("#undo")
        await page.until("document.getElementById('done-text').textContent == 'Undone.'")
        assert await page.text("#answer") == before
        assert await page.js("document.getElementById('added').hidden")
        # Removed by hand, and the removal undone.
        await page.click("#teach-go")
        await page.until("document.getElementById('done-text').textContent.startsWith('Taught.')")
        await page.click("#added-rows button")
        await page.until("document.getElementById('done-text').textContent == 'Removed: a zebra film'")
        assert await page.text("#answer") == before
        await page.click("#undo")
        await page.until("document.getElementById('done-text').textContent == 'Undone.'")
        await page.js("document.getElementById('words').value = 'no such row'; document.getElementById('find').requestSubmit()")
        await page.until("document.getElementById('added-count').textContent.startsWith('0 rows')")
        assert await page.text("#error-text") == ""

    with replica(str(make_run(tmp_path / "run"))) as opened, listening(build_api(opened.endpoint)) as url:
        browse(use)


def test_a_pair_with_a_value_is_corrected_where_a_key_is_needed(tmp_path: Path, browse: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RETRIKT_WRITE_KEYS", KEY)

    async def use(page: Page) -> None:
        await page.open(f"{url}/?text=a+film&text_pair=a+play", 390)
        await page.until("!document.getElementById('key-form').hidden")
        assert "there is no key" in await page.text("#error-text")
        await page.js(f"document.getElementById('key').value = {KEY!r}; document.getElementById('key-form').requestSubmit()")
        await page.until("!document.getElementById('result').hidden")
        before = float(await page.text("#answer .value"))
        await page.js("document.getElementById('should-value').value = 9")
        await page.click("#teach-go")
        await page.until("document.getElementById('done-text').textContent.startsWith('Taught.')")
        assert float(await page.text("#answer .value")) > before
        await page.open(f"{url}/docs", 390)
        await page.until("document.querySelectorAll('details').length > 20")

    with replica(str(make_run(tmp_path / "pair", pair=True, regression=True)), open="nothing") as opened:
        with listening(build_api(opened.endpoint)) as url:
            browse(use)

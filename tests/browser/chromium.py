"""A headless Chromium for tests, driven over its DevTools protocol; needs nothing but aiohttp.

Invariant: what a page logs, throws or fails to load is kept from before its first byte. Nothing outlives the `async
with` that opened a browser: neither its process nor its profile.
"""

from __future__ import annotations

import asyncio
import base64
import itertools
import os
import shutil
import signal
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import aiohttp

NAMES = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-breakpad",
    "--remote-debugging-port=0",
)
START_TIMEOUT_S = 120.0
CALL_TIMEOUT_S = 120.0


def find_chromium() -> str | None:
    """The program to start, or None where there is no Chromium."""
    return next(filter(None, map(shutil.which, (*NAMES, "/usr/bin/chromium"))), None)


class Page:
    """One tab. `problems` collects console errors and warnings, exceptions and failed requests as text."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self.problems: list[str] = []
        self._socket = socket
        self._session_id: str | None = None
        self._numbers = itertools.count(1)
        self._answers: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._loaded = asyncio.Event()
        self._reader = asyncio.create_task(self._read())

    async def attach(self) -> None:
        """Open the tab and start to listen."""
        target = await self.call("Target.createTarget", url="about:blank")
        attached = await self.call("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        self._session_id = attached["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            await self.call(f"{domain}.enable")

    async def close(self) -> None:
        """Stop to listen."""
        self._reader.cancel()
        await asyncio.gather(self._reader, return_exceptions=True)

    async def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """One command of the protocol and its result.

        Raises:
            RuntimeError: Chromium refused it.
        """
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": parameters}
        if self._session_id is not None:
            message["sessionId"] = self._session_id
        answer = self._answers[number] = asyncio.get_running_loop().create_future()
        await self._socket.send_json(message)
        reply = await asyncio.wait_for(answer, CALL_TIMEOUT_S)
        if "error" in reply:
            raise RuntimeError(f"{method}: {reply['error']['message']}")
        return reply["result"]

    async def show(self, path: Path, *, width: int, height: int, scheme: str) -> None:
        """Load the file at `path` in a window of that size and colour scheme, and wait until it is drawn."""
        await self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        await self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self._loaded.clear()
        answer = await self.call("Page.navigate", url=path.resolve().as_uri())
        assert not answer.get("errorText"), answer
        await asyncio.wait_for(self._loaded.wait(), CALL_TIMEOUT_S)
        await self.evaluate("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")

    async def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression in the page, awaited if it is a promise.

        Raises:
            RuntimeError: it threw.
        """
        answer = await self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(answer["exceptionDetails"].get("exception", {}).get("description", "it threw"))
        return answer["result"].get("value")

    async def screenshot(self, path: Path) -> None:
        """The whole document as PNG."""
        answer = await self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(answer["data"]))

    async def _read(self) -> None:
        try:
            async for message in self._socket:
                if message.type == aiohttp.WSMsgType.TEXT:
                    self._take(message.json())
        finally:
            for answer in self._answers.values():
                if not answer.done():
                    answer.set_exception(ConnectionError("Chromium closed the connection"))

    def _take(self, message: dict[str, Any]) -> None:
        if "id" in message:
            answer = self._answers.pop(message["id"], None)
            if answer is not None and not answer.done():
                answer.set_result(message)
            return
        found = message.get("params", {})
        match message["method"]:
            case "Page.loadEventFired":
                self._loaded.set()
            case "Runtime.exceptionThrown":
                self.problems.append(f"exception: {found['exceptionDetails']}")
            case "Runtime.consoleAPICalled" if found["type"] in ("error", "warning", "assert"):
                self.problems.append(f"console: {found['args']}")
            case "Log.entryAdded" if found["entry"]["level"] in ("error", "warning"):
                self.problems.append(f"log: {found['entry']['text']}")
            case "Network.loadingFailed":
                self.problems.append(f"request failed: {found['errorText']}")
            case "Network.responseReceived" if found["response"]["status"] >= 400:
                self.problems.append(f"request refused: {found['response']['url']}")


@asynccontextmanager
async def browser_page(program: str) -> AsyncIterator[Page]:
    """A fresh browser with an empty profile and one tab; the browser ends with the block."""
    with tempfile.TemporaryDirectory(prefix="layerkv-chromium-", ignore_cleanup_errors=True) as profile:
        process = await asyncio.create_subprocess_exec(
            program,
            *FLAGS,
            f"--user-data-dir={profile}",
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            address = await asyncio.wait_for(_address(Path(profile), process), START_TIMEOUT_S)
            async with aiohttp.ClientSession() as session, session.ws_connect(address, max_msg_size=0) as socket:
                page = Page(socket)
                try:
                    await page.attach()
                    yield page
                finally:
                    await page.close()
        finally:
            # All its processes at once: one that is left over would write to the profile while that is removed.
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            await process.wait()


async def _address(profile: Path, process: asyncio.subprocess.Process) -> str:
    """Where the browser listens: Chromium writes the port and the path to a file of its profile."""
    file = profile / "DevToolsActivePort"
    while True:
        if process.returncode is not None:
            raise RuntimeError(f"Chromium ended with exit status {process.returncode} before it listened")
        lines = file.read_text().splitlines() if file.exists() else []
        if len(lines) == 2:
            return f"ws://127.0.0.1:{lines[0]}{lines[1]}"
        await asyncio.sleep(0.05)

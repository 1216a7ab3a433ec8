"""Headless Chromium, driven over its DevTools protocol."""

from __future__ import annotations

import asyncio
import base64
import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def find_browser() -> str | None:
    """Return the path of an installed browser, None if there is none."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


@contextmanager
def open_page(url: str, profile: Path, width: int = 900, height: int = 700) -> Iterator[Page]:
    """Start a browser with an empty profile, open a page and yield it."""
    command = [
        str(find_browser()), "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run",
        "--remote-debugging-port=0", "--disable-dev-shm-usage", "--disable-background-networking",
        "--disable-component-update", "--disable-sync",
        f"--window-size={width},{height}", f"--user-data-dir={profile}", "about:blank",
    ]  # fmt: skip
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    try:
        assert process.stderr is not None
        match = next(filter(None, (re.search(r"DevTools listening on (ws://\S+)", line) for line in process.stderr)))
        loop = asyncio.new_event_loop()
        page = loop.run_until_complete(Page.connect(match[1]))
        page.loop = loop
        try:
            page.call("Page.navigate", url=url)
            page.evaluate("new Promise(done => document.readyState === 'complete' ? done() : onload = done)")
            yield page
        finally:
            loop.run_until_complete(page.close())
            loop.close()
    finally:
        process.kill()
        process.wait()


class Page:
    """An open page. `requests` are the addresses that it has requested, `errors` its exceptions and error messages."""

    loop: asyncio.AbstractEventLoop

    def __init__(self) -> None:
        self.requests: list[str] = []
        self.errors: list[str] = []
        self._next = 0
        self._answers: dict[int, asyncio.Future[Any]] = {}

    @classmethod
    async def connect(cls, url: str) -> Page:
        import aiohttp

        page = cls()
        page._client = aiohttp.ClientSession()
        page._socket = await page._client.ws_connect(url, max_msg_size=0)
        page._reader = asyncio.ensure_future(page._read())
        target = (await page._call("Target.createTarget", {"url": "about:blank"}, None))["targetId"]
        attached = await page._call("Target.attachToTarget", {"targetId": target, "flatten": True}, None)
        page._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Accessibility", "Log"):
            await page._call(f"{domain}.enable", {}, page._session)
        return page

    async def close(self) -> None:
        self._reader.cancel()
        await self._socket.close()
        await self._client.close()

    async def _read(self) -> None:
        async for message in self._socket:
            event = json.loads(message.data)
            if "id" in event:
                self._answers.pop(event["id"]).set_result(event)
            elif event["method"] == "Network.requestWillBeSent":
                self.requests.append(event["params"]["request"]["url"])
            else:
                self.errors += _errors(event["method"], event["params"])

    async def _call(self, method: str, params: dict[str, Any], session: str | None) -> dict[str, Any]:
        self._next += 1
        future = self._answers[self._next] = asyncio.get_running_loop().create_future()
        call = {"id": self._next, "method": method, "params": params, **({"sessionId": session} if session else {})}
        await self._socket.send_str(json.dumps(call))
        answer = await asyncio.wait_for(future, 120)
        assert "error" not in answer, answer
        result: dict[str, Any] = answer["result"]
        return result

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Call a method of the DevTools protocol."""
        return self.loop.run_until_complete(self._call(method, params, self._session))

    def evaluate(self, expression: str) -> Any:
        """Return the value of a JavaScript expression, of a promise when it is fulfilled."""
        result = self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def wait_for(self, condition: str) -> None:
        """Wait until a JavaScript expression is true, looking before each frame."""
        look = f"const look = () => ({condition}) ? done() : requestAnimationFrame(look); look();"
        self.evaluate(f"new Promise(done => {{ {look} }})")

    def type(self, text: str) -> None:
        """Enter text into the element that has the focus."""
        self.call("Input.insertText", text=text)

    def press(self, key: str, code: int) -> None:
        """Press and release a key with this Windows key code."""
        for kind in ("keyDown", "keyUp"):
            text = {"text": "\r"} if key == "Enter" and kind == "keyDown" else {}
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code, **text)

    def open(self, url: str) -> None:
        """Open another page and wait until it is loaded."""
        self.call("Page.navigate", url=url)
        self.evaluate("new Promise(done => document.readyState === 'complete' ? done() : onload = done)")

    def emulate(self, width: int, height: int, dark: bool = False) -> None:
        """Set the size of the window in pixels and the preferred color scheme."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def move_mouse(self, x: float, y: float) -> None:
        """Move the mouse to a position in the window."""
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def screenshot(self) -> bytes:
        """Return the visible page as PNG."""
        return base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"])


def _errors(method: str, params: dict[str, Any]) -> list[str]:
    """Return the errors of an event of the DevTools protocol."""
    if method == "Runtime.exceptionThrown":
        details = params["exceptionDetails"]
        return [str(details.get("exception", {}).get("description") or details["text"])]
    if method == "Runtime.consoleAPICalled" and params["type"] == "error":
        return [" ".join(str(argument.get("value", argument.get("description"))) for argument in params["args"])]
    if method == "Log.entryAdded" and params["entry"]["level"] == "error":
        return [str(params["entry"]["text"])]
    return []

"""A real browser for tests: Debian's chromium without a window, driven by its own DevTools protocol."""

import asyncio
import base64
import itertools
import os
import shutil
import signal
import subprocess
import time

import pytest

SECONDS = 60  # for the browser to start, and for an answer


def find_chromium():
    """The program, or a skipped test."""
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        pytest.skip("no browser: apt-get install chromium")
    return found


class Browser:
    """One page of a browser. folder: for its profile."""

    def __init__(self, folder, width=1280, height=900, dark=False):
        self.program, self.folder, self.size, self.dark = find_chromium(), folder, (width, height), dark
        self.requests, self.messages, self.numbers = [], [], itertools.count(1)

    def __enter__(self):
        port_file = self.folder / "DevToolsActivePort"
        command = [
            self.program, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
            "--disable-background-networking", "--remote-debugging-port=0", f"--user-data-dir={self.folder}",
            "about:blank",
        ]  # fmt: skip
        self.process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        try:
            until = time.monotonic() + SECONDS
            while len(words := port_file.read_text().split() if port_file.is_file() else []) < 2:  # port and address
                assert self.process.poll() is None and time.monotonic() < until, "the browser does not start"
                time.sleep(0.05)
            self.loop = asyncio.new_event_loop()
            self.loop.run_until_complete(self._connect(words[0]))
            self._set_up()
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, *_):
        self.loop.run_until_complete(self._close())
        self.loop.close()
        self._end()

    def _end(self):
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(SECONDS)

    async def _connect(self, port):
        import aiohttp

        self.session = aiohttp.ClientSession()
        async with self.session.get(f"http://127.0.0.1:{port}/json/list") as answer:
            (page,) = [target for target in await answer.json() if target["type"] == "page"]
        self.socket = await self.session.ws_connect(page["webSocketDebuggerUrl"], max_msg_size=0)

    async def _close(self):
        await self.socket.close()
        await self.session.close()

    def _set_up(self):
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        features = [{"name": "prefers-color-scheme", "value": "dark" if self.dark else "light"}]
        self.call("Emulation.setEmulatedMedia", features=features)
        self.resize(*self.size)

    def resize(self, width, height):
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)

    def call(self, method, **params):
        """What a method of the protocol returns."""
        return self.loop.run_until_complete(asyncio.wait_for(self._call(method, params), SECONDS))

    async def _call(self, method, params):
        number = next(self.numbers)
        await self.socket.send_json({"id": number, "method": method, "params": params})
        while (message := await self.socket.receive_json()).get("id") != number:
            self._note(message)
        assert "error" not in message, message
        return message["result"]

    def _note(self, event):
        """Keep what the page asks the network for, and all that it says."""
        params = event.get("params", {})
        if event.get("method") == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])
        elif event.get("method") in ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded"):
            self.messages.append(params)

    def open(self, path):
        """Load a file, and wait until its script has run."""
        self.call("Page.navigate", url=path.as_uri())
        until = time.monotonic() + SECONDS
        while self.value("document.readyState") != "complete":
            assert time.monotonic() < until
            time.sleep(0.02)
        self.frame()

    def frame(self):
        """Wait until what is changed has been drawn."""
        self.value("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => done(1))))")

    def value(self, script):
        """The value of an expression in the page."""
        result = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def box(self, script):
        """(left, top, width, height) of an element, which is scrolled to the middle of the window."""
        centre = "{block: 'center', behavior: 'instant'}"
        self.value(f"({script}).scrollIntoView({centre})")
        self.frame()
        return self.value(f"(b => [b.left, b.top, b.width, b.height])(({script}).getBoundingClientRect())")

    def move(self, x, y):
        """Move the pointer there, as a mouse does."""
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
        self.frame()

    def click(self, script):
        """Click in the middle of an element."""
        left, top, width, height = self.box(script)
        x, y = left + width / 2, top + height / 2
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)
        self.frame()

    def picture(self, path, whole=True):
        """A screenshot of the whole page, or of the window."""
        found = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(found["data"]))

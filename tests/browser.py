"""A headless browser, spoken to through its pipe: no driver and no package is needed beside the browser itself."""

import base64
import contextlib
import json
import os
import shutil
import subprocess
import tempfile

NAMES = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --hide-scrollbars --remote-debugging-pipe"
)


def find_browser() -> str | None:
    return next(filter(None, map(shutil.which, NAMES)), None)


class Page:
    """A page in a browser of its own. Messages are JSON with a zero byte behind each."""

    def __init__(self, read: int, write: int):
        self._read, self._write, self._left, self._number, self._session = os.fdopen(read, "rb"), write, b"", 0, None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self.call("Page.enable")

    def call(self, method: str, **parameters) -> dict:
        """Call a method of the browser's protocol and return its result."""
        self._number += 1
        message = dict(id=self._number, method=method, params=parameters)
        message |= dict(sessionId=self._session) if self._session else {}
        os.write(self._write, json.dumps(message).encode() + b"\0")
        return self._until(lambda answer: answer.get("id") == self._number)["result"]

    def _until(self, wanted) -> dict:
        while True:
            message = bytearray(self._left)
            while b"\0" not in message:
                part = self._read.read1(65536)
                assert part, "the browser has ended"
                message += part
            text, self._left = bytes(message).split(b"\0", 1)
            found = json.loads(text)
            if wanted(found):
                return found

    def open(self, path, *, width: int, scheme: str) -> None:
        """Load a file in a window of a width in points, in the scheme "light" or "dark"."""
        settings = dict(width=width, height=800, deviceScaleFactor=2, mobile=width < 600)
        self.call("Emulation.setDeviceMetricsOverride", **settings)
        self.call("Emulation.setEmulatedMedia", features=[dict(name="prefers-color-scheme", value=scheme)])
        self.call("Page.navigate", url=path.as_uri())
        while self.evaluate("document.readyState") != "complete" or self.evaluate("location.href") == "about:blank":
            pass

    def evaluate(self, expression: str):
        """Return the value of a piece of JavaScript."""
        return self.call("Runtime.evaluate", expression=expression, returnByValue=True)["result"].get("value")

    def screenshot(self, *, whole: bool = False) -> bytes:
        """Return what is seen, or the whole page, as PNG."""
        picture = self.call("Page.captureScreenshot", captureBeyondViewport=whole)
        return base64.b64decode(picture["data"])


@contextlib.contextmanager
def open_browser():
    """Start a browser and end it again."""
    (theirs_in, ours_out), (ours_in, theirs_out) = os.pipe(), os.pipe()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        # The browser reads from 3 and writes to 4.
        line = f'exec "$@" 3<&{theirs_in} 4>&{theirs_out}'
        command = ["bash", "-c", line, "browser", find_browser(), *FLAGS.split(), f"--user-data-dir={profile}"]
        process = subprocess.Popen(command, pass_fds=(theirs_in, theirs_out), stderr=subprocess.DEVNULL)
        os.close(theirs_in)
        os.close(theirs_out)
        try:
            yield Page(ours_in, ours_out)
        finally:
            process.terminate()
            process.wait()
            os.close(ours_out)

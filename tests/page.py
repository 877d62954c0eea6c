"""The page of tools/app.py for tests: a network that mirrors, the program as a server, the page in a browser."""

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from dereflect.tools.page.work import Sent, Work
from tests.helpers import ROOT
from tests.project import executable

CHROMIUM, DRIVER = (shutil.which(name) for name in ("chromium", "chromedriver"))

# Makes this the module models.separator.
STAND_IN = """
import sys, types
import numpy as np
from dereflect.util.errors import UserError

class Mirror:
    def bands(self, image, wanted, watch):
        array = image / np.float32(np.iinfo(image.dtype).max)
        parts = {"transmission": array[:, ::-1], "reflection": array - 0.5}
        for _ in watch([0], 1):
            yield 0, [parts[name] for name in wanted]

def load_separator(checkpoint, inet=None, vgg_weights=None, precision="auto", gpu_ids=None, tile=None, overlap=None,
                   self_ensemble=False, strength=1.0, sizes=None):
    loaded.append((checkpoint.parent.name, precision, tile, inet, strength))
    if "damaged" in str(checkpoint):
        raise UserError("damaged/best.pt: not a checkpoint")
    return Mirror()

loaded = []
sys.modules["dereflect.models.separator"] = separator = types.ModuleType("dereflect.models.separator")
separator.load_separator, separator.loaded, separator.Mirror = load_separator, loaded, Mirror
"""

# Notes what this process opens, changes and connects to, a line of JSON each.
_WITNESS = """
import json, os
_notes = os.open("notes", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
def _note(event, arguments):
    if event.partition(".")[0] in {"open", "os", "shutil", "socket", "subprocess"}:
        path = arguments[0] if arguments and isinstance(arguments[0], (str, bytes)) else ""
        os.write(_notes, json.dumps([event, os.fsdecode(path), repr(arguments)[:300]]).encode() + b"\\n")
sys.addaudithook(_note)
"""


def separated(work: Work, path: Path) -> Sent:
    """The photograph, once it is done or has failed."""
    sent = work.begin("some", path.stat().st_size)
    sent.file.write_bytes(path.read_bytes())
    work.submit(sent)
    until(lambda: not sent.pending, "the separation")
    return sent


def until(happened: Callable, what: str | Callable[[], str], seconds: float = 60):
    """Wait, and return what `happened` returns when it is true."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if result := happened():
            return result
        time.sleep(0.02)
    raise AssertionError(f"{what if isinstance(what, str) else what()} did not come")


def address(process: subprocess.Popen) -> str:
    """Of the page, once it can be opened."""
    lines = []
    for line in process.stderr:
        lines.append(line)
        if line.startswith("Open "):
            return line.split()[1]
    raise AssertionError("".join(lines))


class Server:
    """The program, in a folder with some checkpoints; nobody has more patience than two seconds."""

    def __init__(self, folder: Path, *options: str):
        self.folder, self.temporary = folder, folder / "temporary"
        self.temporary.mkdir()
        for age, name in enumerate(("first", "second", "damaged")):
            path = folder / "checkpoints" / name / "best.pt"
            executable(path, "")
            os.utime(path, (1e9 - age, 1e9 - age))
        start = "from dereflect.tools import app\nfrom dereflect.tools.page import server\nserver.SLOW = 2\n"
        code = f"{STAND_IN}\n{_WITNESS}\n{start}"
        limits = ["--max_megabytes", "1", "--max_megapixels", "1", "--queue", "3"]
        self.process = subprocess.Popen(
            [sys.executable, "-c", f"{code}sys.exit(app.run(app.main))", "--port", "0", *limits, *options],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(self.temporary)},
            stderr=subprocess.PIPE,
            text=True,
        )
        self.url = address(self.process)
        self.port = int(self.url.rpartition(":")[2])

    @property
    def own(self) -> Path:
        """The app's own folder."""
        (folder,) = self.temporary.glob("sirr-app-*")
        return folder

    def photographs(self) -> list[Path]:
        """The folders of all photographs that it has."""
        return [path for path in self.own.iterdir() if path.is_dir()]

    def notes(self) -> list[list[str]]:
        """What it has opened, changed and connected to: event, path, all about it."""
        return [json.loads(line) for line in (self.folder / "notes").read_text().splitlines()]

    def raw(self, request: bytes, end: bool = False) -> tuple[int, dict[str, str], bytes]:
        """Send bytes as they are; the status (0: none came), the headers and the body of the answer.

        Args:
            request: with `Host: localhost` where it has no Host, and asking for the connection to be closed.
            end: say that nothing more will follow.
        """
        head, blank, body = request.partition(b"\r\n\r\n")
        if b"\nhost:" not in head.lower():
            head += b"\r\nHost: localhost"
        answer = b""
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=30)
        with connection, contextlib.suppress(OSError):  # cut off
            connection.sendall(head + b"\r\nConnection: close" + blank + body)
            if end:
                connection.shutdown(socket.SHUT_WR)
            while part := connection.recv(2**16):
                answer += part
        return parsed(answer)

    def get(self, target: str, method: str = "GET", headers: str = "") -> tuple[int, dict[str, str], bytes]:
        return self.raw(f"{method} {target} HTTP/1.1\r\n{headers}\r\n".encode())

    def post(self, body: bytes, query: str = "", headers: str = "") -> tuple[int, dict]:
        """Send a photograph; status and JSON of the answer."""
        head = f"POST /separate{query} HTTP/1.1\r\n{headers}Content-Length: {len(body)}\r\n\r\n"
        status, _, answer = self.raw(head.encode() + body)
        return status, json.loads(answer or "null")

    def status(self, token: str) -> dict:
        """Of a photograph."""
        return json.loads(self.get(f"/result/{token}")[2])

    def separate(self, body: bytes) -> str:
        """The token of a photograph, once it is separated."""
        status, answer = self.post(body)
        assert status == 202, answer
        until(lambda: self.status(answer["token"])["state"] == "done", lambda: str(self.status(answer["token"])))
        return answer["token"]

    def stop(self) -> tuple[int, str]:
        """The exit status, and what it has said since it was open."""
        self.process.send_signal(signal.SIGTERM)
        told = self.process.stderr.read()
        return self.process.wait(30), told


def parsed(answer: bytes) -> tuple[int, dict[str, str], bytes]:
    """Status (0 of an empty answer), headers and body."""
    head, _, body = answer.partition(b"\r\n\r\n")
    lines = head.decode("latin-1").split("\r\n")
    headers = dict(re.split(": *", line, maxsplit=1) for line in lines[1:])
    return int(lines[0].split()[1]) if answer else 0, headers, body


class Page:
    """The page in a browser."""

    def __init__(self, driver, url: str, downloads: Path):
        self.driver = driver
        self.url = url
        self.downloads = downloads

    def open(self) -> None:
        self.driver.get(self.url)
        self.until(lambda: "megabytes" in self.text(), "the page")

    def find(self, selector: str) -> list:
        return self.driver.find_elements("css selector", selector)

    def text(self) -> str:
        return self.driver.find_element("css selector", "body").text

    def until(self, happened, what: str):
        return until(happened, lambda: f"{what} (the page says: {self.text()})", 90)

    def drop(self, *paths: Path) -> None:
        self.find("#files")[0].send_keys("\n".join(map(str, paths)))

    def separated(self, count: int = 1) -> list:
        """The elements of all photographs, once that many are done or have failed."""
        ended = "article:has(> progress[hidden])"
        return self.until(lambda: len(self.find(ended)) == count and self.find(ended), "the results")

    def do(self, script: str, *arguments):
        return self.driver.execute_script(script, *arguments)


@contextlib.contextmanager
def browser(url: str, folder: Path) -> Iterator[Page]:
    """The page in Chromium, which has its profile and its downloads in that folder."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in (
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--disable-background-networking",
        "--window-size=1280,1300",
        f"--user-data-dir={folder / 'profile'}",
    ):
        options.add_argument(argument)
    downloads = folder / "downloads"
    options.add_experimental_option("prefs", {"download.default_directory": str(downloads)})
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    try:
        yield Page(driver, url, downloads)
    finally:
        driver.quit()

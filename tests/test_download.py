"""tools/prepare_data.py download: a large file over HTTP, in several attempts."""

import contextlib
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from dereflect.tools import prepare_data
from dereflect.tools.preparation import download
from dereflect.util import program
from tests.helpers import errors


class Server:
    """Serves one file with Range, and may break off.

    Attributes:
        content, tag: the file and its ETag.
        breaks: of the next answers, after how many bytes each breaks off.
        asked: the Range of every request.
        ranges: whether Range is understood.
        shift: by how much it is misunderstood.
    """

    def __init__(self, content: bytes):
        self.content, self.tag, self.ranges, self.shift = content, '"1"', True, 0
        self.breaks: list[int] = []
        self.asked: list[str | None] = []
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                server.answer(self)

            def log_message(self, *_):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/sirs.zip"
        self.thread = threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01})
        self.thread.start()

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        wanted = request.headers.get("Range")
        self.asked.append(wanted)
        start = 0
        if wanted and self.ranges and request.headers.get("If-Range") == self.tag:
            start = int(re.fullmatch(r"bytes=(\d+)-", wanted)[1]) + self.shift
        if start >= len(self.content):
            request.send_response(416)
            request.send_header("Content-Range", f"bytes */{len(self.content)}")
            request.send_header("Content-Length", "0")
            request.end_headers()
            return
        request.send_response(206 if start else 200)
        if start:
            request.send_header("Content-Range", f"bytes {start}-{len(self.content) - 1}/{len(self.content)}")
        request.send_header("Content-Length", str(len(self.content) - start))
        request.send_header("ETag", self.tag)
        request.end_headers()
        part = self.content[start:]
        with contextlib.suppress(ConnectionError):  # the other side has heard enough
            request.wfile.write(part[: self.breaks.pop(0)] if self.breaks else part)

    def close(self) -> None:
        self.http.shutdown()
        self.http.server_close()
        self.thread.join()


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(download, "_PAUSE", 0)
    server = Server(np.random.default_rng(0).bytes(3_500_000))
    yield server
    server.close()


def fetch(server: Server, path: Path) -> int:
    return program.run(prepare_data.main, ["download", str(path), "--url", server.url])


def check_fetched(server: Server, path: Path) -> None:
    assert path.read_bytes() == server.content
    digest = hashlib.sha256(server.content).hexdigest()
    assert path.with_name("sirs.zip.sha256").read_text() == f"{digest}  sirs.zip\n"
    assert {file.name for file in path.parent.iterdir()} == {"sirs.zip", "sirs.zip.sha256"}


def test_download(server, tmp_path, capsys):
    assert fetch(server, tmp_path / "new/sirs.zip") == 0
    check_fetched(server, tmp_path / "new/sirs.zip")
    assert hashlib.sha256(server.content).hexdigest() in capsys.readouterr().out
    assert fetch(server, tmp_path / "new/sirs.zip") == 2 and len(server.asked) == 1
    assert "is there already" in errors(capsys)


def test_a_broken_off_transfer_goes_on_where_it_stopped(server, tmp_path, capsys):
    server.breaks = [1_000_000, 500_000]
    assert fetch(server, tmp_path / "sirs.zip") == 0
    check_fetched(server, tmp_path / "sirs.zip")
    assert server.asked == [None, "bytes=1000000-", "bytes=1500000-"]
    assert "broke off after 1,000,000 of 3,500,000 bytes" in capsys.readouterr().out


def leave_part(folder: Path, content: bytes, tag: str | None) -> None:
    (folder / "sirs.zip.part").write_bytes(content)
    (folder / "sirs.zip.part.json").write_text(json.dumps(tag))


def test_an_earlier_part_is_used(server, tmp_path, capsys):
    leave_part(tmp_path, server.content[:2_000_000], '"1"')
    assert fetch(server, tmp_path / "sirs.zip") == 0
    check_fetched(server, tmp_path / "sirs.zip")
    assert server.asked == ["bytes=2000000-"]


def test_a_part_that_is_all_of_it_is_used(server, tmp_path, capsys):
    leave_part(tmp_path, server.content, '"1"')
    assert fetch(server, tmp_path / "sirs.zip") == 0
    check_fetched(server, tmp_path / "sirs.zip")


@pytest.mark.parametrize("case", ["another version", "no ranges", "wrong ranges", "unknown version", "longer"])
def test_a_part_of_something_else_is_not_used(case, server, tmp_path, capsys):
    leave_part(tmp_path, bytes(1_000_000), None if case == "unknown version" else '"1"')
    if case == "another version":
        server.tag = '"2"'
    elif case == "no ranges":
        server.ranges = False
    elif case == "wrong ranges":
        server.shift = 5
    elif case == "longer":
        leave_part(tmp_path, bytes(4_000_000), '"1"')
    assert fetch(server, tmp_path / "sirs.zip") == 0
    check_fetched(server, tmp_path / "sirs.zip")


def test_what_breaks_again_and_again_is_given_up_and_its_part_kept(server, tmp_path, capsys):
    server.breaks = [1_000_000, *[0] * 20]
    assert fetch(server, tmp_path / "sirs.zip") == 2
    assert "goes on where it stopped" in capsys.readouterr().err
    assert (tmp_path / "sirs.zip.part").read_bytes() == server.content[:1_000_000]
    server.breaks.clear()
    assert fetch(server, tmp_path / "sirs.zip") == 0
    check_fetched(server, tmp_path / "sirs.zip")


def test_what_cannot_be_reached_is_one_line_with_ways_out(tmp_path, capsys):
    server = Server(b"")
    server.close()
    assert fetch(server, tmp_path / "sirs.zip") == 2
    said = errors(capsys)
    assert not list(tmp_path.iterdir())
    assert server.url in said and str(tmp_path / "sirs.zip") in said and "--url" in said
    assert program.run(prepare_data.main, ["download", str(tmp_path / "x"), "--url", "file:///etc/passwd"]) == 2
    assert "http" in errors(capsys)


@pytest.mark.parametrize("name", ["sirs.zip", "sirs.zip.part", "sirs.zip.part.json"])
@pytest.mark.parametrize("kind", ["empty", "text", "link"])
def test_a_users_own_files_and_links_are_left_alone(server, tmp_path, capsys, name, kind):
    mine = tmp_path / name
    if kind == "link":
        mine.symlink_to(tmp_path / "gone")
    else:
        mine.write_text("mine" if kind == "text" else "")
    assert fetch(server, tmp_path / "sirs.zip") == 2
    assert f"{mine}: is there" in errors(capsys) and server.asked == []
    assert mine.is_symlink() if kind == "link" else mine.read_text() == ("mine" if kind == "text" else "")
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize(
    "url",
    [
        "http://[::1",
        "http://x:port/",
        "http://a b/",
        "http://",
        "http:///x",
        "http://.a/",
        "http://é\ud800/",
        "ftp://x/",
        "ftp://x/\r\ny",
        "http://x/\r\nHost: y",
        "http://x/\x1b[2J",
    ],
)
def test_malformed_addresses_are_one_line(url, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(download, "_PAUSE", 0)
    assert program.run(prepare_data.main, ["download", str(tmp_path / "sirs.zip"), "--url", url]) == 2
    errors(capsys)
    assert not list(tmp_path.iterdir())

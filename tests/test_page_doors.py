"""The page's doors, attacked with requests that no browser would send: nothing but the app's own files is touched."""

import asyncio
import contextlib
import io
import re
import socket
import struct
import sys
import threading
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("uvicorn")

from dereflect.tools.page.server import HEADERS, Doors
from dereflect.util.formats.png import SIGNATURE
from tests.faults.pictures import chunk
from tests.helpers import ROOT, contents
from tests.page import Server, until

LONG = "x" * 5000
NAMES = [
    "", ".", "..", "../..", "../../../etc/passwd", "..%2f..%2f..%2fetc%2fpasswd", "%2e%2e/%2e%2e/etc/passwd",
    "/etc/passwd", "%2fetc%2fpasswd", "..\\..\\x", "%5c%5cevil%5cx", "%00", "x%00.png", "%c0%ae%c0%ae/x", "%ff%fe",
    "%uff0e%uff0e/x", "%", "%zz", "~", "~root", "*", "{name}", "$HOME", "C:", "con", "file:///etc/passwd",
    "http://127.0.0.1:9/x", "http:%2f%2fevil.example", "//evil.example/x", "%0d%0aSet-Cookie:x=1", "photograph",
    ".lock", "0" * 32, LONG, "../" * 500,
]  # fmt: skip


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("served"), "--checkpoint", "checkpoints/first/best.pt")
    yield server
    server.stop()


@pytest.fixture(scope="module")
def noise() -> bytes:
    """A photograph whose PNG files, of 3 MB, are more than a connection buffers."""
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (1000, 1000, 3), np.uint8)).save(file, "JPEG", quality=50)
    assert len(file.getvalue()) < 2**20
    return file.getvalue()


@pytest.fixture(scope="module")
def small() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (60, 40), "teal").save(file, "PNG")
    return file.getvalue()


@pytest.fixture(autouse=True)
def witness(server) -> Iterator[None]:
    """Fails a test in which the program opens, changes or connects to anything but its own."""
    victims = server.folder / "victims"
    victims.mkdir(exist_ok=True)
    (victims / "holiday.png").write_bytes(b"precious")
    (server.temporary / "of another program").touch()
    begun, before = len(server.notes()), (contents(victims), {path.name for path in server.temporary.iterdir()})
    yield
    own = str(server.own)
    code = tuple(str(Path(place).resolve()) for place in (sys.prefix, sys.base_prefix, ROOT))
    for event, path, everything in server.notes()[begun:]:
        harmless = event in {"os.listdir", "os.scandir"} or event.startswith("socket.__new__") or event == "os.fork"
        imported = event == "open" and path.startswith(code) and not path.endswith((".pt", ".png"))
        ours = path.startswith(own) or not path.startswith("/")  # what rmtree does stands relative to its folder
        assert harmless or imported or (ours and not event.startswith(("socket.", "subprocess."))), (event, everything)
    assert (contents(victims), {path.name for path in server.temporary.iterdir()}) == before
    assert sorted(path.name for path in server.folder.iterdir()) == ["checkpoints", "notes", "temporary", "victims"]


# Names.


PLACES = ["/{}", "/result/{}", "/result/{}/transmission.png", "/result/TOKEN/{}", "/separate/{}"]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("method", ["GET", "DELETE"])
def test_dishonest_paths(server, small, place, method):
    place = place.replace("TOKEN", server.separate(small)) if "TOKEN" in place else place
    for name in NAMES:
        status, headers, body = server.get(place.format(name), method)
        page = method == "GET" and place == "/{}" and not name
        assert status in ({200} if page else {400, 404, 405}), (name, status, body)
        assert "Set-Cookie" not in headers and b"precious" not in body and b"root:" not in body
    assert "TOKEN" not in place or server.photographs()


def test_dishonest_names_of_weights_and_photographs(server, small):
    victim = server.folder / "victims/holiday.png"
    for name in NAMES:
        for query in (f"?weights={name}", f"?weights={victim}", f"?weights={name}&weights={victim}"):
            assert server.post(small, query) == (422, {"error": "There are no such weights."})
        headers = f"X-Name: {name}\r\nContent-Disposition: attachment; filename={name}\r\nCookie: session={victim}\r\n"
        query = f"?name={name}&filename={victim}&path={victim}&session_hash={victim}"
        status, answer = server.post(small, query, headers)
        assert status == 202, (name, answer)
        until(lambda answer=answer: server.status(answer["token"])["state"] == "done", name)
        assert server.get(f"/result/{answer['token']}", "DELETE")[0] == 204


STRENGTHS = ["", "x", "nan", "inf", "-inf", "-1", "1.01", "1e999", "0x1", "1;2", "9" * 4000, "%00", "../x"]


def test_dishonest_strengths(server, small):
    token = server.separate(small)
    for strength in STRENGTHS:
        status, _, body = server.get(f"/result/{token}/transmission.png?strength={strength}")
        assert status == 422 and b"from 0 to 1" in body, strength


@pytest.mark.parametrize("scheme", ["http", "HTTP", "https", "ftp", "file", "gopher"])
def test_no_address_is_fetched(server, scheme):
    """In any form; the witness sees every connection, and every name that is looked up."""
    address = f"{scheme}://127.0.0.1:{server.port}/about"
    for before in ("", "/", "//", "/file=", "/proxy=", "/result/", "/gradio_api/file="):
        assert server.get(before + address)[0] in {400, 404}
    bodies = [
        address,
        f"[InternetShortcut]\nURL={address}",
        f'<svg xmlns="http://www.w3.org/2000/svg"><image href="{address}"/></svg>',
        f'{{"path": "{address}", "meta": {{"_type": "gradio.FileData"}}}}',
        f'<!DOCTYPE x SYSTEM "{address}"><x/>',
    ]
    for body in bodies:
        status, answer = server.post(body.encode(), f"?url={address}", f"X-Url: {address}\r\nReferer: {address}\r\n")
        assert status == 422 and re.search("not an image|not read", answer["error"])
    assert server.raw(f"CONNECT 127.0.0.1:{server.port} HTTP/1.1\r\n\r\n".encode())[0] in {400, 404, 405}


# Who may ask.

ORIGIN = "Origin: http://localhost:7860\r\n"
BROWSER = "User-Agent: Mozilla/5.0 (X11) Firefox/140\r\n"


@pytest.mark.parametrize(
    ("method", "path", "headers", "status"),
    [
        ("GET", "/", "Host: 127.0.0.1:7860", 200),
        ("GET", "/", "Host: LocalHost", 200),
        ("GET", "/", "Host: [::1]:7860", 200),
        ("GET", "/", "Host: localhost\r\nSec-Fetch-Site: cross-site", 200),  # somebody's link
        ("GET", "/x", "Host: localhost\r\nSec-Fetch-Site: none", 200),
        ("POST", "/x", f"Host: localhost:7860\r\n{ORIGIN}{BROWSER}Sec-Fetch-Site: same-origin", 200),
        ("POST", "/x", "Host: localhost:7860\r\nUser-Agent: curl/8", 200),
        ("GET", "/", "Host: evil.example:7860", 421),
        ("GET", "/", "Host: 127.0.0.1.evil.example", 421),
        ("GET", "/", "Host: localhost.evil.example", 421),
        ("GET", "/", "Host: localhost@evil.example", 421),
        ("GET", "/", "Host: evil.example@localhost:x", 421),
        ("GET", "/", "Host: localhost.", 421),
        ("GET", "/", "Host: 192.0.2.7:7860", 421),
        ("GET", "/", "Host: [::2", 421),
        ("GET", "/", "Host: ", 421),
        ("GET", "/", "Accept: */*", 421),
        ("GET", "/x", "Host: localhost\r\nSec-Fetch-Site: cross-site", 403),
        ("GET", "/x", "Host: localhost\r\nSec-Fetch-Site: same-site", 403),
        ("POST", "/x", "Host: localhost:7860\r\nOrigin: http://evil.example", 403),
        ("POST", "/x", "Host: localhost:7860\r\nOrigin: http://localhost:8000", 403),
        ("POST", "/x", "Host: localhost:7860\r\nOrigin: http://127.0.0.1:7860", 403),
        ("POST", "/x", "Host: localhost:7860\r\nOrigin: null", 403),
        ("POST", "/x", "Host: localhost:7860\r\nOrigin: ", 403),
        ("POST", "/x", f"Host: localhost:7860\r\n{ORIGIN}Sec-Fetch-Site: cross-site", 403),
        ("POST", "/x", "Host: localhost:7860\r\nSec-Fetch-Site: same-origin", 403),  # a browser would tell its origin
        ("POST", "/x", f"Host: localhost:7860\r\n{BROWSER}Accept: */*", 403),
        ("DELETE", "/x", "Host: localhost:7860\r\nOrigin: http://evil.example", 403),
        ("PUT", "/x", "Host: localhost:7860\r\nSec-Fetch-Site: cross-site", 403),
        ("OPTIONS", "/x", "Host: localhost:7860\r\nOrigin: http://evil.example", 403),
    ],
)
def test_who_may_ask(method, path, headers, status):
    assert asked(Doors(page, "127.0.0.1"), method, path, headers) == status


@pytest.mark.parametrize(
    ("host", "name", "status"),
    [
        ("::", "192.0.2.7:7860", 200),
        ("0.0.0.0", "[fd00::7]:7860", 200),  # noqa: S104
        ("studio.lan", "STUDIO.lan:7860", 200),
        ("0.0.0.0", "evil.example", 421),  # noqa: S104
        ("::", "127.1", 421),
        ("", "2130706433", 421),
        ("studio.lan", "192.0.2.7", 421),
    ],
)
def test_seen_by_all_it_answers_to_addresses_but_to_no_other_name(host, name, status):
    assert asked(Doors(page, host), "GET", "/", f"Host: {name}") == status


async def page(scope, receive, send):
    await send({"type": "http.response.start", "status": 200, "headers": []})


def asked(doors: Doors, method: str, path: str, headers: str) -> int:
    sent = []

    async def send(message):
        sent.append(message)

    pairs = [line.split(": ", 1) for line in headers.split("\r\n")]
    pairs = [(key.lower().encode(), value.encode()) for key, value in pairs]
    asyncio.run(doors({"type": "http", "method": method, "path": path, "headers": pairs}, None, send))
    assert sum(message["type"] == "http.response.start" for message in sent) == 1
    return sent[0]["status"]


def test_the_doors_of_the_program(server, small):
    many = [
        ("GET / HTTP/1.1\r\nHost: evil.example\r\n\r\n", 421),
        ("GET / HTTP/1.0\r\nHost: evil.example\r\n\r\n", 421),
        ("GET / HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\n\r\n", 400),
        ("GET /about HTTP/1.1\r\nHost:\r\n\r\n", 421),
        ("GET http://localhost/ HTTP/1.1\r\nHost: evil.example\r\n\r\n", 421),
        ("GET / HTTP/1.1\r\nX-Forwarded-Host: localhost\r\nHost: evil.example\r\n\r\n", 421),
    ]
    for request, status in many:
        assert server.raw(request.encode())[0] == status, request
    assert server.post(small, "", "Origin: http://evil.example\r\n")[0] == 403
    assert server.post(small, "", f"Host: 127.0.0.1:{server.port}\r\nOrigin: {server.url}\r\n")[0] == 202


@pytest.mark.parametrize("method", ["HEAD", "OPTIONS", "PUT", "PATCH", "TRACE", "PROPFIND", "DELETE", "GET"])
def test_other_methods(server, small, method):
    token = server.separate(small)
    for target in ("/", "/about", "/separate", f"/result/{token}/before.jpg", "/nothing"):
        status, headers, _ = server.get(target, method)
        seen = method in {"GET", "HEAD"} and target != "/separate"
        assert status == (404 if target == "/nothing" else 200 if seen else 405), target
        assert all(headers.get(name) == value for name, value in HEADERS.items()), "whatever the answer is"
        assert "access-control-allow-origin" not in headers and "server" not in headers
    assert server.status(token)["state"] == "done"


def test_the_page_has_nothing_inline_and_the_policy_allows_nothing(server):
    _, headers, body = server.get("/")
    policy = headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "frame-ancestors 'none'" in policy
    assert (headers["x-content-type-options"], headers["referrer-policy"]) == ("nosniff", "no-referrer")
    assert body.count(b"<script") == body.count(b'src="/page.js"></script>') == 1
    assert (
        b"<style" not in body and b"style=" not in body and b" on" not in body.replace(b" one", b"").split(b"<body>")[0]
    )
    for name in ("page.css", "page.js", "icon.svg", "example_1_soft.jpg"):
        assert server.get(f"/{name}")[0] == 200
    script = server.get("/page.js")[2]
    assert b"innerHTML" not in script and b"http:" not in script and b"https:" not in script


# Bodies.


def test_bodies_that_are_too_large(server):
    before = set(server.photographs())
    for size in (2**20 + 1, 10**15, 2**70):
        status, _, body = server.raw(
            f"POST /separate HTTP/1.1\r\nContent-Length: {size}\r\n\r\n".encode() + b"x" * 1000
        )
        assert (status == 413 and b"Larger than 1 megabytes" in body) or (status == 400 and size == 2**70)
    began = time.monotonic()
    with socket.create_connection(("127.0.0.1", server.port)) as endless:
        endless.sendall(b"POST /separate HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n")
        with pytest.raises(ConnectionError):
            while time.monotonic() - began < 20:
                endless.sendall(b"10000\r\n" + bytes(2**16) + b"\r\n")
    assert set(server.photographs()) <= before


@pytest.mark.parametrize("chunked", [False, True])
def test_uploads_that_break_off_leave_nothing(server, small, chunked):
    before = set(server.photographs())
    body = b"20\r\n" + small[:32] + b"\r\n" if chunked else small[:32]
    length = "Transfer-Encoding: chunked" if chunked else f"Content-Length: {len(small)}"
    for end in [False] * 10 + [True] * 2:  # reset, or ended
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            connection.sendall(f"POST /separate HTTP/1.1\r\nHost: localhost\r\n{length}\r\n\r\n".encode() + body)
            time.sleep(0.02)
            linger = struct.pack("ii", not end, 0)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    until(lambda: set(server.photographs()) <= before, "the end of the rest", 10)
    assert server.separate(small)


def test_who_is_slow_is_cut_off(server, noise):
    """In the head of a request, between two, in the body, and in taking what was asked for."""
    token = server.separate(noise)
    head = b"POST /separate HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9999\r\n\r\n"
    begun = [b"", b"GET / HT", b"GET /about HTTP/1.1\r\nHost: localhost\r\n\r\n", head, head + b"x"]
    begun.append(f"GET /result/{token}/transmission.png HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
    slow = []
    for request in begun:
        slow.append(socket.socket())
        slow[-1].setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow[-1].settimeout(20)
        slow[-1].connect(("127.0.0.1", server.port))
        slow[-1].sendall(request)
    began = time.monotonic()
    with contextlib.suppress(ConnectionError):
        while time.monotonic() - began < 15:
            slow[1].sendall(b"T")  # a byte now and then is slow, too
            time.sleep(0.2)
    assert time.monotonic() - began < 10
    taken = [b"".join(iter(lambda made=made: received(made), b"")) for made in slow]
    assert b" 408 " in taken[3] and b" 408 " in taken[4]
    assert 100 < len(taken[5]) < 2_000_000, "only what was in the buffers"
    assert time.monotonic() - began < 15
    assert all((folder / "transmission.png").exists() for folder in server.photographs()), "uploads leave nothing"


def received(connection: socket.socket) -> bytes:
    with contextlib.suppress(ConnectionError):
        return connection.recv(2**16)
    return b""


ODD = [
    b"GET /about HTTP/1.1\r\nHost: localhost\r\n\r\n" * 500,
    b"\x16\x03\x01" * 50,
    b"\0" * 100,
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    b"GET / HTTP/9.9\r\n\r\n",
    b"X" * 10**6,
    b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 10**5,
    b"GET /\xff\xfe HTTP/1.1\r\n\r\n",
    b"POST /separate HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
    b"POST /separate HTTP/1.1\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    b"GET / HTTP/1.1\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n",
]


def test_odd_requests_do_no_harm(server, small):
    for request in ODD:
        server.raw(request, end=True)
    assert server.separate(small)


def png(width: int, height: int, bits: int = 8, claim: int | None = None) -> bytes:
    """Nothing but zeros, or an IDAT chunk that only claims a length."""
    header = SIGNATURE + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, 2, 0, 0, 0))
    if claim is not None:
        return header + struct.pack(">I", claim) + b"IDAT"
    packer = zlib.compressobj(9)
    block = bytes(2**20)  # of the largest ones only a part
    size = min(height * (1 + width * 3 * bits // 8), 2**26)
    content = b"".join(packer.compress(block[: size - done]) for done in range(0, size, 2**20)) + packer.flush()
    return header + chunk(b"IDAT", content) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("bomb", "told"),
    [
        (png(16, 16, 16, claim=0xFFFFFFF0), "truncated"),
        (png(20_000, 20_000), "more than 1,000,000 pixels"),
        (png(2**31 - 1, 2**31 - 1, 16), "pixels"),
        (png(1000, 1000, 16)[:-2000], "truncated"),
        (b"P6 1000000 1000000 255\n", ""),
        (b"GIF89a\xff\xff\xff\xff\x80\0\0", ""),
        (b"II*\0\x08\0\0\0\xff\xff", ""),
    ],
)
def test_bombs(server, bomb, told):
    status, answer = server.post(bomb)
    if status == 202:  # by its header it's a picture
        until(lambda: server.status(answer["token"])["state"] == "failed", "its end")
        answer = server.status(answer["token"])
    assert status in {202, 422} and told in answer["error"] and "sirr-app" not in answer["error"]
    peak = next(line for line in Path(f"/proc/{server.process.pid}/status").read_text().splitlines() if "VmHWM" in line)
    assert int(peak.split()[1]) < 1_500_000, peak  # kB, of which torch alone takes the half


def test_many_at_once(server, small, noise):
    """Three may wait and one be in work; the others are told so at once, and all that were taken are separated."""
    answers = []
    bodies = [noise, small] * 20
    threads = [threading.Thread(target=lambda body=body: answers.append(server.post(body))) for body in bodies]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    taken = [answer["token"] for status, answer in answers if status == 202]
    assert len(answers) == 40 and taken and {status for status, _ in answers} <= {202, 503}
    assert all("Busy" in answer["error"] for status, answer in answers if status == 503 and answer)
    until(lambda: all(server.status(token)["state"] == "done" for token in taken), "all")
    for token in taken:
        assert server.get(f"/result/{token}/transmission.png?strength=0.5")[0] == 200

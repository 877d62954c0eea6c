"""The page's few routes, and its doors.

Requests name nothing but tokens that were drawn here, and texts that are keys of a dict: none becomes a path or an
address. What isn't the page's own is refused: another name of this machine (DNS rebinding), another page's request.
"""

import asyncio
import contextlib
import ipaddress
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from dereflect.tools.page.work import LAYERS, PREVIEWS, BusyError, Sent, Work
from dereflect.util.errors import UserError

_HERE = Path(__file__).parent
_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml",
          ".jpg": "image/jpeg", ".png": "image/png"}  # fmt: skip
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'"
)
HEADERS = {
    "content-security-policy": _POLICY,
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cache-control": "no-store",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
}
"""Of every answer: the browser loads nothing from elsewhere, guesses no types, keeps nothing, frames nothing."""

SLOW = 20  # seconds without a whole request, or without any of an answer being taken, after which a connection ends
_SLOWEST = 2**14  # bytes a second of an upload, after the first SLOW seconds
_CONNECTIONS = 64  # at once that are answered
_CHUNK = 2**18
_GONE = "This photograph is no longer kept here; send it again."


class Doors:
    """An application for the page's own requests alone; all others are refused.

    Args:
        app: the application.
        host: the name or address that it listens at. Where that means all addresses, any address is right as a name.
    """

    def __init__(self, app: Callable, host: str):
        self._app = app
        self._names = {"localhost", "127.0.0.1", "[::1]", host.lower(), f"[{host.lower()}]"} - {"", "[]"}
        self._anywhere = host in {"0.0.0.0", "::", ""}  # noqa: S104

    async def __call__(self, scope: dict, receive: Callable, send: Callable) -> None:
        app = self._app
        if scope["type"] == "http" and (refusal := self._refusal(Request(scope))):
            app = JSONResponse({"error": refusal[1]}, refusal[0])
        await app(scope, receive, send)

    def _refusal(self, request: Request) -> tuple[int, str] | None:
        headers = request.headers
        asked = headers.get("host", "").lower()
        name, _, port = asked.rpartition(":")
        if not port.isdecimal():
            name = asked
        if name not in self._names and not (self._anywhere and _is_address(name)):
            return 421, "This page has another name."
        site, origin = headers.get("sec-fetch-site"), headers.get("origin")
        looking = request.method in {"GET", "HEAD"}
        if site not in {None, "same-origin", "none"} and not (looking and request.scope["path"] == "/"):
            return 403, "Not from this page."
        browser = site is not None or "mozilla" in headers.get("user-agent", "").lower()
        if not looking and (browser if origin is None else origin.lower().partition("://")[2] != asked):
            return 403, "Not from this page."
        return None


def _is_address(name: str) -> bool:
    with contextlib.suppress(ValueError):
        return bool(ipaddress.ip_address(name[1:-1] if name[:1] == "[" else name))
    return False


class Page:
    """The routes.

    Args:
        work: separates.
        about: what the page has to know: the names of the checkpoints as "weights", the name that is "chosen", and
            the "megabytes" that a photograph may have.
        files: to be served, beside those of the page itself.
    """

    def __init__(self, work: Work, about: dict, files: list[Path]):
        self._work, self._about = work, about
        files = [path for path in [*_HERE.iterdir(), *files] if path.suffix in _TYPES]
        self._files = {path.name: (path.read_bytes(), _TYPES[path.suffix]) for path in files}
        self._about["examples"] = sorted(name for name in self._files if name.startswith("example"))
        self.app = Starlette(
            routes=[
                Route("/", self._file),
                *(Route(f"/{name}", self._file) for name in self._files),
                Route("/about", self._tell),
                Route("/separate", self._separate, methods=["POST"]),
                Route("/result/{token}", self._status),
                Route("/result/{token}", self._forget, methods=["DELETE"]),
                Route("/result/{token}/{name}", self._result),
            ],
            exception_handlers={HTTPException: _refuse},
        )
        self.app.router.redirect_slashes = False

    async def _file(self, request: Request) -> Response:
        content, kind = self._files[request.scope["path"][1:] or "index.html"]
        return Response(content, media_type=kind)

    async def _tell(self, request: Request) -> Response:
        return JSONResponse(self._about)

    async def _separate(self, request: Request) -> Response:
        weights = request.query_params.get("weights", self._about["chosen"])
        if weights not in self._about["weights"]:
            _no(422, "There are no such weights.")
        most = self._about["megabytes"] * 2**20
        if (size := int(request.headers.get("content-length", most))) > most:
            self._too_large()
        try:
            sent = self._work.begin(weights, size)
        except BusyError as error:
            _no(503, str(error))
        try:
            with sent.file.open("wb") as file:
                await self._receive(request, file, most)
            await run_in_threadpool(self._work.submit, sent)
            if await request.is_disconnected():  # nobody learns its token
                self._work.forget(sent)
        except UserError as error:
            _no(422, str(error))
        except OSError as error:
            _no(507, f"The photograph cannot be stored: {error.strerror}.")
        finally:
            if sent.state == "sending":
                self._work.forget(sent)
        return JSONResponse({"token": sent.token}, 202)

    async def _receive(self, request: Request, file: BinaryIO, most: int) -> None:
        """Write a request's body."""
        size, now = 0, asyncio.get_running_loop().time
        started = now()
        while True:
            try:
                message = await asyncio.wait_for(request.receive(), started + SLOW + size / _SLOWEST - now())
            except asyncio.TimeoutError:
                _no(408, "The photograph came too slowly.")
            if message["type"] == "http.disconnect":
                _no(400, "The photograph was broken off.")
            size += file.write(message["body"])
            if size > most:
                self._too_large()
            if not message["more_body"]:
                return

    def _too_large(self) -> None:
        _no(413, f"Larger than {self._about['megabytes']} megabytes.")

    def _find(self, request: Request) -> Sent:
        return self._work.find(request.path_params["token"]) or _no(404, _GONE)

    async def _status(self, request: Request) -> Response:
        return JSONResponse(self._work.status(self._find(request)))

    async def _forget(self, request: Request) -> Response:
        self._work.forget(self._find(request))
        return Response(status_code=204)

    async def _result(self, request: Request) -> Response:
        sent, name = self._find(request), request.path_params["name"]
        if name not in PREVIEWS + LAYERS or sent.state != "done":
            _no(404, "Not found.")
        try:
            strength = float(request.query_params.get("strength", 1))
        except ValueError:
            strength = -1
        if not 0 <= strength <= 1:
            _no(422, "The strength must be a number from 0 to 1.")
        try:
            file = await run_in_threadpool(self._work.open_result, sent, name, strength)
        except BusyError as error:
            _no(503, str(error))
        except (FileNotFoundError, UserError):
            _no(404, _GONE)
        headers = {"content-length": str(file.seek(0, 2))}
        if name in LAYERS:
            headers["content-disposition"] = "attachment"
        return StreamingResponse(_chunks(file), media_type=_TYPES[Path(name).suffix], headers=headers)


def _chunks(file: BinaryIO) -> Iterator[bytes]:
    with file:
        file.seek(0)
        while chunk := file.read(_CHUNK):
            yield chunk


def _no(status: int, why: str) -> None:
    raise HTTPException(status, why, {"retry-after": "5"} if status == 503 else None)


async def _refuse(request: Request, error: HTTPException) -> Response:
    return JSONResponse({"error": error.detail}, error.status_code, error.headers)


def listen(host: str, port: int) -> socket.socket:
    """A socket at an address.

    Raises:
        UserError: it is taken, or isn't this machine's.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        door = socket.create_server((host, port), family=family)
        door.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _CHUNK)  # of each connection: what a slow one may hold
        return door
    except (OSError, OverflowError, UnicodeError) as error:
        raise UserError(f"--host {host} --port {port}: cannot listen there ({error}); try another --port") from error


async def serve(app: Callable, door: socket.socket, work: Work) -> None:
    """Serve until a signal ends it, which uvicorn catches and raises again at the end."""
    server = uvicorn.Server(
        uvicorn.Config(
            app,
            http="h11",
            ws="none",
            lifespan="off",
            log_level="error",
            proxy_headers=False,
            server_header=False,
            headers=list(HEADERS.items()),
            limit_concurrency=_CONNECTIONS,
            h11_max_incomplete_event_size=2**14,
        )
    )
    tending = asyncio.create_task(_tend(server, work))
    await server.serve(sockets=[door])
    tending.cancel()


async def _tend(server: uvicorn.Server, work: Work) -> None:
    """Sweep, and break off connections whose other end is slow; all of them, once the server is to end."""
    now = asyncio.get_running_loop().time
    slow: dict = {}  # connections that are waited for, and since when
    while True:
        waits = {
            connection
            for connection in server.server_state.connections
            if connection.cycle is None or connection.cycle.response_complete or connection.flow.write_paused
        }
        slow = {connection: slow.get(connection, now()) for connection in waits}
        patience = SLOW if len(slow) < _CONNECTIONS / 2 else 1  # so that there is room for others
        for connection, since in slow.items():
            if now() - since > patience:
                connection.transport.abort()
        if server.should_exit:
            for connection in list(server.server_state.connections):
                connection.transport.abort()
        work.sweep()
        await asyncio.sleep(0.5)

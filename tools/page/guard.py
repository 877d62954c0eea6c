"""What the page lets in: its own requests alone."""

import ipaddress
from collections.abc import Callable
from urllib.parse import unquote

# The browser may load nothing from other machines, guesses no types, and shows the page in no frame.
_POLICY = b"default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; frame-ancestors 'none'; base-uri 'self'"
_HEADERS = [(b"content-security-policy", _POLICY), (b"x-content-type-options", b"nosniff")]
_HEADERS += [(b"x-frame-options", b"DENY"), (b"referrer-policy", b"no-referrer")]


def guarded(app: Callable, host: str, has_room: Callable[[], bool] = lambda: True) -> Callable:
    """The application for this page's own requests alone.

    Refused are other names of this machine than the one it listens at (DNS rebinding), requests that another page has
    made, addresses that the application would fetch, and uploads when its folder is full. Browsers are told to load
    nothing from elsewhere, to guess no types, and to show the page in no frame.
    """
    names = {"localhost", "127.0.0.1", "[::1]", host, f"[{host}]"}
    anywhere = host in {"0.0.0.0", "::", ""}  # noqa: S104

    def refusal(scope: dict) -> tuple[int, bytes] | None:
        headers = {key.lower(): value.decode("latin-1") for key, value in scope["headers"]}
        asked = headers.get(b"host", "")
        name = asked.rpartition(":")[0] if asked.rpartition(":")[2].isdigit() else asked
        if name not in names and not (anywhere and _is_address(name)):
            return 421, b"this page has another name"
        origin = headers.get(b"origin")
        foreign = origin is not None and origin.partition("://")[2] != asked
        if scope["method"] not in {"GET", "HEAD"} and (foreign or headers.get(b"sec-fetch-site") == "cross-site"):
            return 403, b"not from this page"
        path = unquote(scope["path"]).lower()
        if "http:" in path or "https:" in path or "://" in path or "proxy=" in path:
            return 403, b"no other addresses here"
        if path.rstrip("/").endswith("/upload") and not has_room():
            return 507, b"too many photographs at once; try again later"
        return None

    async def call(scope, receive, send):
        async def send_with_policy(message):
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *_HEADERS]
            await send(message)

        if scope["type"] == "http" and (refused := refusal(scope)):
            await send_with_policy({"type": "http.response.start", "status": refused[0], "headers": []})
            await send({"type": "http.response.body", "body": refused[1]})
            return
        await app(scope, receive, send_with_policy)

    return call


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name.strip("[]"))
    except ValueError:
        return False
    return True

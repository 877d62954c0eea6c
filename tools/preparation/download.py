"""One large file over HTTP, in as many attempts as it takes."""

import hashlib
import http.client
import json
import re
import time
import urllib.error
import urllib.request
from pathlib import Path

from util.errors import UserError
from util.progress import Progress

ATTEMPTS = 5
"""In a row without a byte of progress."""

_CHUNK = 1 << 20
_SECONDS = 30.0  # of silence, after which a connection is given up
_PAUSE = 2.0  # seconds before the next attempt
_BROKEN = (OSError, http.client.HTTPException)


class _Incomplete(Exception):
    """A transfer ended before its end."""


def download(url: str, path: Path) -> None:
    """Fetch a file, going on with what an earlier attempt has left; its SHA-256 is written beside it.

    Until it is complete it is PATH.part; PATH.part.json holds which version of the file the part is of, so that
    parts of two versions are never joined.

    Raises:
        UserError: it can't be fetched or written.
    """
    if not url.startswith(("http://", "https://")):
        raise UserError(f"--url {url}: not an address that begins with http:// or https://")
    if path.exists():
        raise UserError(f"{path}: is there already; unpack it, or move it away to fetch it anew")
    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.touch()
    except OSError as error:
        raise UserError(f"{part}: cannot be written: {error.strerror}") from error
    try:
        _transfer_all(url, part, path)
    finally:
        if not part.stat().st_size:  # nothing to go on with
            part.unlink()
            _note(part).unlink(missing_ok=True)
    _finish(part, path)


def _transfer_all(url: str, part: Path, path: Path) -> None:
    """Attempts until the part is the whole file."""
    failures = 0
    while True:
        before = part.stat().st_size
        try:
            return _transfer(url, part)
        except urllib.error.HTTPError as error:
            if error.code < 500:
                raise UserError(_unreachable(url, path, f"the server says {error.code} {error.reason}")) from error
            reason = f"the server says {error.code} {error.reason}"
        except (*_BROKEN, _Incomplete) as error:
            reason = str(getattr(error, "reason", error)) or type(error).__name__
        failures = 0 if part.stat().st_size > before else failures + 1
        if failures == ATTEMPTS or (failures and not part.stat().st_size):
            raise UserError(_unreachable(url, path, reason))
        print(f"{reason}; {part.stat().st_size / 1e6:.1f} MB are there, going on", flush=True)
        time.sleep(_PAUSE)


def _transfer(url: str, part: Path) -> None:
    """Append what is missing to the part."""
    start, version = part.stat().st_size, _version_of(part)
    headers = {"User-Agent": "prepare_data", "Accept-Encoding": "identity"}
    if start and version:
        headers |= {"Range": f"bytes={start}-", "If-Range": version}
    try:
        request = urllib.request.Request(url, headers=headers)  # noqa: S310 - `download` takes http and https only,
        answer = urllib.request.urlopen(request, timeout=_SECONDS)  # noqa: S310 - and so do redirections
    except urllib.error.HTTPError as error:
        whole = re.fullmatch(r"bytes \*/(\d+)", error.headers.get("Content-Range", ""))
        if error.code == 416 and whole and int(whole[1]) == start:
            return  # nothing is missing
        if error.code == 416:
            part.write_bytes(b"")  # longer than the file, so of something else
            return _transfer(url, part)
        raise
    with answer:
        if answer.status == 206:
            rest = re.fullmatch(rf"bytes {start}-\d+/(\d+)", answer.headers.get("Content-Range", ""))
            if not rest:
                _note(part).unlink(missing_ok=True)  # the next attempt asks for all of it
                raise _Incomplete("the server sent another part than the one asked for")
            total = int(rest[1])
        else:
            part.write_bytes(b"")
            _note(part).write_text(json.dumps(_version(answer)), encoding="utf-8")
            start, total = 0, int(answer.headers.get("Content-Length") or 0)
        _append(answer, part, start, total)


def _append(answer: http.client.HTTPResponse, part: Path, start: int, total: int) -> None:
    done = start
    progress = Progress(f"{part.stem}, MiB", max(1, total // _CHUNK), start // _CHUNK)
    try:
        with part.open("ab") as file:
            while chunk := answer.read(_CHUNK):
                file.write(chunk)
                file.flush()
                for _ in range(done // _CHUNK, (done + len(chunk)) // _CHUNK):
                    progress.step()
                done += len(chunk)
    finally:
        progress.close()
    if total and done != total:
        raise _Incomplete(f"the transfer broke off after {done:,} of {total:,} bytes")


def _finish(part: Path, path: Path) -> None:
    sha256 = hashlib.sha256()
    with part.open("rb") as file:
        while chunk := file.read(_CHUNK):
            sha256.update(chunk)
    digest = sha256.hexdigest()
    path.with_name(path.name + ".sha256").write_text(f"{digest}  {path.name}\n", encoding="utf-8")
    part.replace(path)
    _note(part).unlink(missing_ok=True)
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB, sha256 {digest}")


def _note(part: Path) -> Path:
    return part.with_name(part.name + ".json")


def _version(answer: http.client.HTTPResponse) -> str | None:
    """What tells the file's versions apart; a weak ETag doesn't."""
    tag = answer.headers.get("ETag")
    return tag if tag and not tag.startswith("W/") else answer.headers.get("Last-Modified")


def _version_of(part: Path) -> str | None:
    try:
        version = json.loads(_note(part).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return version if isinstance(version, str) and version.isprintable() else None


def _unreachable(url: str, path: Path, reason: str) -> str:
    return (
        f"{url} can't be fetched ({reason}). Ways out: try again later, which goes on where it stopped; fetch it "
        f"with a browser or on another machine and put it at {path}; name another address with --url; or train on "
        "the demo set, which needs no download"
    )

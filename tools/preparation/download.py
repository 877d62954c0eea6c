"""One large file over HTTP, in as many attempts as it takes."""

import hashlib
import http.client
import json
import os
import time
import urllib.error
import urllib.request
from pathlib import Path

from dereflect.util.errors import UserError, printable
from dereflect.util.progress import track

ATTEMPTS = 5
"""In a row without a byte of progress."""

_CHUNK = 1 << 20
_SECONDS = 30.0  # of silence, after which a connection is given up
_PAUSE = 2.0  # seconds before the next attempt
_HELP = (
    "Ways out: try again later, which goes on where it stopped; fetch it with a browser or on another machine and put "
    "it at {path}; name another address with --url; or train on the demo set, which needs no download"
)


def download(url: str, path: Path) -> None:
    """Fetch a file, going on with what an earlier attempt has left; its SHA-256 is written beside it.

    Until it is complete it is PATH.part; PATH.part.json holds which version of the file the part is of, so that
    parts of two versions are never joined.

    Raises:
        UserError: it can't be fetched or written.
    """
    shown = printable(url)
    if not url.startswith(("http://", "https://")):
        raise UserError(f"--url {shown}: not an address that begins with http:// or https://")
    if os.path.lexists(path):
        raise UserError(f"{path}: is there already; unpack it, or move it away to fetch it anew")
    part, note = (path.with_name(path.name + suffix) for suffix in (".part", ".part.json"))
    if os.path.lexists(part) and not (_is_own(note) and part.is_file() and not part.is_symlink()):
        raise UserError(f"{part}: is there, and is not what a download of this program has left; move it away")
    if os.path.lexists(note) and not _is_own(note):
        raise UserError(f"{note}: is there, and is not what a download of this program has left; move it away")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if not note.exists():
            note.write_text("null", encoding="utf-8")  # says whose the part is
        part.touch()
    except OSError as error:
        raise UserError(f"{part}: cannot be written: {error.strerror}") from error
    failures = 0
    try:
        while True:
            before = part.stat().st_size
            try:
                _transfer(url, part, note)
                break
            except (http.client.InvalidURL, ValueError, OverflowError) as error:
                raise UserError(f"--url {shown}: not an address that can be asked ({printable(error)})") from error
            except (OSError, http.client.HTTPException) as error:
                answered = isinstance(error, urllib.error.HTTPError)
                reason = str(error if answered else getattr(error, "reason", error)) or type(error).__name__
                refused = answered and error.code < 500
            size = part.stat().st_size
            failures = 0 if size > before else failures + 1
            if refused or failures == ATTEMPTS or (failures and not size):
                raise UserError(f"{shown} can't be fetched ({reason}). {_HELP.format(path=path)}")
            print(f"{reason}; {size / 1e6:.1f} MB are there, going on", flush=True)
            time.sleep(_PAUSE)
    finally:
        if not part.stat().st_size:  # nothing to go on with
            part.unlink()
            note.unlink(missing_ok=True)
    digest = _sha256(part)
    path.with_name(path.name + ".sha256").write_text(f"{digest}  {path.name}\n", encoding="utf-8")
    part.replace(path)
    note.unlink(missing_ok=True)
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB, sha256 {digest}")


def _transfer(url: str, part: Path, note: Path) -> None:
    """Append what is missing to the part.

    Raises:
        OSError, HTTPException: something is still missing.
    """
    start, version = part.stat().st_size, _version(note)
    headers = {"User-Agent": "prepare_data", "Accept-Encoding": "identity"}
    if start and version:
        headers |= {"Range": f"bytes={start}-", "If-Range": version}
    try:
        request = urllib.request.Request(url, headers=headers)  # noqa: S310 - `download` takes http and https only,
        answer = urllib.request.urlopen(request, timeout=_SECONDS)  # noqa: S310 - and so do redirections
    except urllib.error.HTTPError as error:
        if error.code != 416:  # the range is outside the file
            raise
        if error.headers.get("Content-Range") != f"bytes */{start}":
            part.write_bytes(b"")  # longer than the file, so of something else
            _transfer(url, part, note)
        return
    with answer, part.open("ab") as file:
        if answer.status != 206:
            file.truncate(0)
            start = 0
            tag = answer.headers.get("ETag") or "W/"  # a weak one doesn't tell versions apart
            note.write_text(json.dumps(answer.headers.get("Last-Modified") if tag.startswith("W/") else tag), "utf-8")
        elif not answer.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
            note.write_text("null", encoding="utf-8")  # the next attempt asks for all of it
            raise ConnectionError("the server sent another part than the one asked for")
        length = int(answer.headers.get("Content-Length") or 0)
        chunks = iter(lambda: answer.read(_CHUNK), b"")
        for chunk in track(chunks, f"{part.stem}, MiB from {start // _CHUNK}", max(1, length // _CHUNK)):
            file.write(chunk)
            file.flush()
        if length and file.tell() != start + length:
            raise ConnectionError(f"the transfer broke off after {file.tell():,} of {start + length:,} bytes")


def _is_own(note: Path) -> bool:
    """Whether a file is a note of this program: the name of a version, or null."""
    try:
        if note.is_symlink() or not note.is_file() or note.stat().st_size > _CHUNK:
            return False
        return isinstance(json.loads(note.read_text(encoding="utf-8")), str | None)
    except (OSError, ValueError, RecursionError):
        return False


def _version(note: Path) -> str | None:
    """What the server called the version of the file that the part is of."""
    try:
        version = json.loads(note.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return version if isinstance(version, str) and version.isprintable() else None


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()

"""Archives from anywhere: nothing in them can get out of the folder, be a link, or fill the disk."""

import shutil
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

from util.errors import UserError
from util.progress import track

_MOST_FILES = 1_000_000
_CHUNK = 1 << 20
_MOST_HEADER = 1 << 20  # bytes of a name or of a PAX header, which tarfile would read into memory whatever they are
_DAMAGE = (zipfile.BadZipFile, tarfile.TarError, zlib.error, EOFError, RuntimeError, NotImplementedError, ValueError)


@dataclass
class Member:
    """A file or folder of an archive.

    Attributes:
        name: as the archive has it.
        size: in bytes, unpacked.
        kind: "file", "folder", or what else it is, in words.
        open: its content.
    """

    name: str
    size: int
    kind: str
    open: Callable[[], IO[bytes]]


def unpack(archive: Path, folder: Path, limit: int) -> None:
    """Unpack a zip or tar archive. All its names are looked at before anything is written.

    Args:
        archive: the file.
        folder: made if missing; files that are there already are not touched.
        limit: bytes that its content may have.

    Raises:
        UserError: it is no archive, damaged, or has something that it should not have.
    """
    try:
        with _members(archive) as members:
            files = _checked(members(), archive, folder, limit)
        with _members(archive) as members:
            _extract(members(), folder, len(files))
    except OSError as error:
        raise UserError(f"{archive}: cannot be unpacked into {folder}: {error}") from error
    except _DAMAGE as error:
        raise UserError(f"{archive}: damaged, or of a kind that can't be read ({error})") from error
    print(f"{folder}: {len(files)} files")
    _say_where(files, folder)


class _TarInfo(tarfile.TarInfo):
    def _proc_member(self, archive: tarfile.TarFile) -> tarfile.TarInfo:  # tarfile's hook for subclasses
        if self.type not in (*tarfile.REGULAR_TYPES, tarfile.DIRTYPE) and self.size > _MOST_HEADER:
            raise UserError(f"{archive.name}: has a header of {self.size:,} bytes, which none needs")
        return super()._proc_member(archive)


@contextmanager
def _members(archive: Path) -> Iterator[Callable[[], Iterable[Member]]]:
    """An archive opened: a function that goes through its members."""
    if not archive.is_file():
        raise UserError(f"{archive}: there is no such file")
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as opened:
            yield lambda: _zip_members(opened)
        return
    try:
        opened = tarfile.open(archive, tarinfo=_TarInfo)  # noqa: SIM115 - closed below
    except tarfile.TarError as error:
        raise UserError(f"{archive}: neither a zip nor a tar archive, or not all of it") from error
    with opened:
        yield lambda: _tar_members(opened)


def _zip_members(archive: zipfile.ZipFile) -> Iterator[Member]:
    for info in archive.infolist():
        mode = info.external_attr >> 16
        kind = "folder" if info.is_dir() else "file"
        if stat.S_IFMT(mode) not in (0, stat.S_IFREG, stat.S_IFDIR):
            kind = "link" if stat.S_ISLNK(mode) else "special file"
        elif info.flag_bits & 1:
            kind = "file with a password"
        yield Member(info.filename, info.file_size, kind, lambda info=info: archive.open(info))


def _tar_members(archive: tarfile.TarFile) -> Iterator[Member]:
    for info in archive:
        kind = "special file"
        if info.isdir():
            kind = "folder"
        elif info.issym() or info.islnk():
            kind = "link"
        elif info.isreg() and not info.issparse():
            kind = "file"
        yield Member(info.name, info.size, kind, lambda info=info: archive.extractfile(info))


def _checked(members: Iterable[Member], archive: Path, folder: Path, limit: int) -> list[PurePosixPath]:
    """The names of all files, once nothing is wrong with any member."""
    files: set[PurePosixPath] = set()
    total = 0
    for member in members:
        name = _inside(member.name, archive)
        if member.kind == "folder":
            continue
        if not name.parts:
            raise UserError(f"{archive}: has a file without a name")
        if member.kind != "file":
            raise UserError(f"{archive}: {member.name!r} is a {member.kind}; only files and folders are unpacked")
        if name in files:
            raise UserError(f"{archive}: has two files named {member.name!r}")
        files.add(name)
        total += member.size
        if total > limit or len(files) > _MOST_FILES:
            raise UserError(f"{archive}: holds more than {limit / 1e9:g} GB or {_MOST_FILES:,} files; see --max_gb")
        if (folder / name).exists():
            raise UserError(f"{folder / name}: is there already; move it away, or unpack into another folder")
    return sorted(files)


def _inside(name: str, archive: Path) -> PurePosixPath:
    """A member's path below the folder.

    Raises:
        UserError: it would be outside, on this system or another.
    """
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name or ":" in name or "\0" in name:
        raise UserError(f"{archive}: {name!r} is not a name within a folder; nothing has been unpacked")
    return path


def _extract(members: Iterable[Member], folder: Path, count: int) -> None:
    files = (member for member in members if member.kind == "file")
    for member in track(files, "unpacking", count):
        target = folder / member.name
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(target.name + ".part")
        try:
            with member.open() as source, partial.open("xb") as file:
                shutil.copyfileobj(source, file, _CHUNK)
            partial.rename(target)
        finally:
            partial.unlink(missing_ok=True)


def _say_where(files: list[PurePosixPath], folder: Path) -> None:
    """Which --base_dir it makes: archives often have all of it in a folder."""
    bases = {folder.joinpath(*path.parts[:i]) for path in files for i in (0, 1, 2) if path.parts[i:][:1] == ("train",)}
    bases = bases or {
        folder.joinpath(*path.parts[:i]) for path in files for i in (0, 1, 2) if path.parts[i:][:1] == ("test",)
    }
    for base in sorted(bases):
        print(f"data to train or test on: --base_dir {base}")

"""Archives from anywhere: nothing in them can get out of the folder, be a link, or fill the disk."""

import os
import stat
import tarfile
import tempfile
import zipfile
from pathlib import Path, PurePosixPath

from dereflect.util.errors import UserError
from dereflect.util.progress import track

_MOST_FILES = 1_000_000
_MOST_HEADER = 1 << 20  # bytes of a name or of a PAX header, which tarfile would read into memory whatever they are
_CHUNK = 1 << 20

Archive = zipfile.ZipFile | tarfile.TarFile
Info = zipfile.ZipInfo | tarfile.TarInfo


def unpack(archive: Path, folder: Path, limit: int) -> None:
    """Unpack a zip or tar archive.

    All names and sizes are checked before anything is written, and the files move into the folder when all of them
    are unpacked. A tar archive also passes the standard library's filter "data".

    Args:
        archive: the file.
        folder: made if missing; files that are there already are not touched.
        limit: the most bytes that its content may have.

    Raises:
        UserError: it is no archive, damaged, or has something that it should not have.
    """
    if not archive.is_file():
        raise UserError(
            f"{archive}: " + ("not a regular file" if os.path.lexists(archive) else "there is no such file")
        )
    try:
        with _open(archive) as opened:
            files = _check(opened, archive, folder, limit)
            if isinstance(opened, tarfile.TarFile):
                _read_to_the_end(opened, archive, limit)
            _extract(opened, files, folder)
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"{archive}: cannot be unpacked into {folder}: {error}") from error
    except Exception as error:  # on a damaged archive the readers raise nearly anything
        reason = str(error) or type(error).__name__
        raise UserError(f"{archive}: damaged, or of a kind that can't be read ({reason})") from error
    print(f"{folder}: {len(files)} files")
    _print_base_dirs(files, folder)


class _TarInfo(tarfile.TarInfo):
    def _proc_member(self, archive: tarfile.TarFile) -> tarfile.TarInfo:  # tarfile's hook for subclasses
        if self.type not in (*tarfile.REGULAR_TYPES, tarfile.DIRTYPE) and self.size > _MOST_HEADER:
            raise UserError(f"{archive.name}: has a header of {self.size:,} bytes, which none needs")
        return super()._proc_member(archive)


def _open(archive: Path) -> Archive:
    if zipfile.is_zipfile(archive):
        return zipfile.ZipFile(archive)
    try:
        opened = tarfile.open(archive, tarinfo=_TarInfo)  # noqa: SIM115 - closed by the caller
    except tarfile.TarError as error:
        raise UserError(f"{archive}: neither a zip nor a tar archive, or not all of it") from error
    opened.extraction_filter = getattr(tarfile, "data_filter", None)  # None: a Python from before June 2023
    return opened


def _check(opened: Archive, archive: Path, folder: Path, limit: int) -> dict[PurePosixPath, Info]:
    """All files by their path below the folder, once nothing is wrong with any member."""
    files: dict[PurePosixPath, Info] = {}
    total = 0
    for info in opened.infolist() if isinstance(opened, zipfile.ZipFile) else opened:
        _use_slashes(info)
        name, size, kind = _describe(info)
        path = PurePosixPath(name)
        if _is_of_mac_os(path) and kind in ("file", "folder"):
            continue
        if path.is_absolute() or ".." in path.parts or set(name) & set(":\0"):  # on this system or another
            raise UserError(f"{archive}: {name!r} is not a name within a folder; nothing has been unpacked")
        if kind == "folder":
            continue
        if not path.parts:
            raise UserError(f"{archive}: has a file without a name")
        if kind != "file":
            raise UserError(f"{archive}: {name!r} is a {kind}; only files and folders are unpacked")
        if path in files:
            raise UserError(f"{archive}: has two files named {name!r}")
        files[path] = info
        total += size
        if total > limit or len(files) > _MOST_FILES:
            raise UserError(f"{archive}: holds more than {limit / 1e9:g} GB or {_MOST_FILES:,} files; see --max_gb")
        if os.path.lexists(folder / path):  # a link that leads nowhere included
            raise UserError(f"{folder / path}: is there already; move it away, or unpack into another folder")
    return files


def _read_to_the_end(opened: tarfile.TarFile, archive: Path, limit: int) -> None:
    """Read a tar archive's end, where a compressed one has the checksum of all its content.

    tarfile takes a damaged header for the end, and stops before what is behind the last file.

    Raises:
        UserError: the archive ends too early, or goes on behind its end.
    """
    opened.fileobj.seek(opened.offset)
    count = 0
    while chunk := opened.fileobj.read(_CHUNK):
        count += len(chunk)
        if chunk.strip(b"\0") or count > limit + _MOST_HEADER:
            raise UserError(f"{archive}: damaged: it goes on behind its end")
    if count < tarfile.BLOCKSIZE:
        raise UserError(f"{archive}: cut short: it has no end")


def _use_slashes(info: Info) -> None:
    """Take backslashes in a name, as old programs for Windows wrote them, for what they stand for."""
    if isinstance(info, tarfile.TarInfo):
        info.name = info.name.replace("\\", "/")
    else:
        info.filename = info.filename.replace("\\", "/")


def _is_of_mac_os(path: PurePosixPath) -> bool:
    """Whether macOS has added this to an archive: a file's resource fork, which has the file's name after "._"."""
    return "__MACOSX" in path.parts or path.name.startswith("._") or path.name == ".DS_Store"


def _describe(info: Info) -> tuple[str, int, str]:
    """A member's name, its size in bytes, and whether it is a "file", a "folder", a "link" or a "special file"."""
    if isinstance(info, tarfile.TarInfo):
        is_file, is_folder, is_link = info.isreg() and not info.issparse(), info.isdir(), info.issym() or info.islnk()
        name, size = info.name, info.size
    else:
        mode = stat.S_IFMT(info.external_attr >> 16)
        is_file, is_folder = mode in (0, stat.S_IFREG), info.is_dir() and mode in (0, stat.S_IFDIR)
        is_link = stat.S_ISLNK(mode)
        name, size = info.filename, info.file_size
    kinds = {"folder": is_folder, "link": is_link, "file": is_file, "special file": True}
    return name, size, next(kind for kind, holds in kinds.items() if holds)


def _extract(opened: Archive, files: dict[PurePosixPath, Info], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".unpacking-", dir=folder) as name:
        unpacked = Path(name)
        for info in track(files.values(), "unpacking", len(files)):
            opened.extract(info, unpacked)
        for path in files:
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (unpacked / path).rename(folder / path)


def _print_base_dirs(files: dict[PurePosixPath, Info], folder: Path) -> None:
    """Print which --base_dir the files make, at most two folders deep: archives often have all of it in a folder."""
    for layer in ("train", "test"):
        depths = [(path, depth) for path in files for depth in range(3) if path.parts[depth : depth + 1] == (layer,)]
        for base in sorted({folder.joinpath(*path.parts[:depth]) for path, depth in depths}):
            print(f"data to train or test on: --base_dir {base}")
        if depths:
            return

"""Which photographs do files, folders and patterns name, and what is to be made of each?"""

import glob
import os
import stat
from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from dereflect.util.errors import UserError, printable

NAMES = {"t": "behind_glass", "r": "reflection", "residue": "residue", "sidebyside": "sidebyside"}
"""What can be made of a photograph, as --save takes it, and how the files' names end."""

ENDS = {*NAMES.values(), "t", "r"}
"""Ends of the names of files that were made, by older versions too."""


@dataclass(frozen=True)
class Source:
    """A photograph that was named.

    Attributes:
        file: the photograph.
        folder: its folder, below the one that was named, or below where a pattern's first wildcard stands.
        found: whether it was found in a folder or by a pattern, not named by itself.
    """

    file: Path
    folder: Path
    found: bool


@dataclass
class Search:
    """What paths have led to.

    Attributes:
        sources: the photographs, each once.
        unread: pictures that were found and are of formats that are not read.
        problems: a line for each folder or file that could not be looked at.
    """

    sources: list[Source] = field(default_factory=list)
    unread: list[Path] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Job:
    """A photograph, the format and, by kind, the names of what is to be made of it."""

    source: Path
    form: str
    outputs: dict[str, Path]


@dataclass(frozen=True)
class Plan:
    """What is to be made, and what is not.

    Attributes:
        jobs: a job for each photograph.
        problems: a line for each photograph or folder that can't be used.
        made: what earlier calls have made, found beside the photographs.
        unread: pictures that were found and are of formats that are not read.
    """

    jobs: list[Job]
    problems: list[str]
    made: list[Path]
    unread: list[Path]


def status(path: Path) -> os.stat_result | None:
    """What the system says of a path, None if there is nothing.

    Raises:
        UserError: it can't say: a folder before it may not be searched, the name is too long.
    """
    try:
        return path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:  # a ValueError: a zero byte in it
        raise UserError(f"{path}: {getattr(error, 'strerror', None) or error}") from error


def find_photographs(paths: Sequence[str]) -> Search:
    """Look for what was named.

    Raises:
        UserError: a path leads to no photograph, or can't be followed.
    """
    search = Search()
    seen: set[str] = set()
    several = sum(os.path.isdir(path) for path in paths) > 1  # noqa: PTH112 - doesn't raise
    for path in paths:
        before = len(search.problems)
        sources = _sources(path, several, search)
        if not sources:
            if len(search.problems) > before:
                raise UserError(search.problems[before])
            raise UserError(f"{path}: {_nothing(path, search)}")
        for source in sources:
            if (real := os.path.realpath(source.file)) not in seen:
                seen.add(real)
                search.sources.append(source)
    return search


def _nothing(path: str, search: Search) -> str:
    if not os.path.isdir(path):  # noqa: PTH112
        return "there is no such file"
    unread = f", only pictures of formats that are not read, such as {search.unread[-1].name}" if search.unread else ""
    return f"has no photographs in it{unread}"


def _sources(path: str, several: bool, search: Search) -> list[Source]:
    """The photographs of one path; of several folders, each has a folder of its own name for its results."""
    from dereflect.util.formats import SUFFIXES, UNREAD_SUFFIXES

    if not path:
        raise UserError("'': an empty path names no photograph")
    top = Path(path)
    known = status(top)
    if known and not stat.S_ISDIR(known.st_mode):
        return [Source(top, Path(), False)]
    if known:
        own = Path(Path(os.path.realpath(top)).name) if several else Path()
        files = [(file, own / file.parent.relative_to(top)) for file in sorted(_walk(top, search))]
    else:
        base = _fixed(path)
        names = sorted(glob.glob(path, recursive=True))  # noqa: PTH207 - of text, as it was written
        files = [(Path(name), Path(os.path.relpath(Path(name).parent, base))) for name in names]
    sources = []
    for file, folder in files:
        suffix = file.suffix.lower()
        if file.name.startswith(".") or suffix not in SUFFIXES | UNREAD_SUFFIXES:
            continue
        try:
            found = status(file)
        except UserError as error:
            search.problems.append(str(error))
            continue
        if found and stat.S_ISREG(found.st_mode):
            if suffix in UNREAD_SUFFIXES:
                search.unread.append(file)
            else:
                sources.append(Source(file, folder, True))
    return sources


def _walk(top: Path, search: Search) -> Iterator[Path]:
    """All files below a folder."""

    def note(error: OSError) -> None:
        search.problems.append(f"{printable(error.filename)}: cannot be read: {error.strerror}")

    for place, _, names in os.walk(top, onerror=note):
        yield from (Path(place) / name for name in names)


def _fixed(pattern: str) -> Path:
    """The folder before a pattern's first wildcard."""
    parts = Path(pattern).parts
    fixed = next((n for n, part in enumerate(parts) if glob.has_magic(part)), len(parts) - 1)
    return Path(*parts[:fixed])


def find_jobs(options: Namespace) -> Plan:
    """What is to be made of which photograph, in order.

    Raises:
        UserError: a path leads to no photograph.
    """
    from dereflect.util.photographs import format_of, suffix_for

    search = find_photographs(options.paths)
    siblings: dict[Path, list[Path]] = {}

    def suffix(file: Path) -> str:
        return suffix_for(file, options.format or format_of(file))

    def stem(file: Path) -> str:
        """The name, with its suffix where another one beside it would become the same."""
        if suffix(file) == file.suffix:
            return file.stem
        if file.parent not in siblings:
            siblings[file.parent] = _pictures(file.parent)
        same = [other for other in siblings[file.parent] if other.stem == file.stem and other.name != file.name]
        return f"{file.stem}_{file.suffix[1:]}" if any(suffix(other) == suffix(file) for other in same) else file.stem

    def outputs(source: Source, apart: Path) -> dict[str, Path]:
        place = options.output / apart / source.folder if options.output else source.file.parent
        return {kind: place / f"{stem(source.file)}_{end}{suffix(source.file)}" for kind, end in NAMES.items()}

    # What was made of a photograph in a folder before is none of the folder's photographs.
    made, folders = set(), {}
    for source in search.sources:
        place = os.path.realpath(outputs(source, Path())["t"].parent)
        made |= {(place, f"{name}_{end}") for name in (stem(source.file), source.file.stem) for end in ENDS}
        folders.setdefault(source.file.stem, []).append(source.folder)

    def is_made(source: Source) -> bool:
        here = (os.path.realpath(source.file.parent), source.file.stem) in made
        return source.found and (here or _made_elsewhere(source, folders))

    earlier = [source.file for source in search.sources if is_made(source)]
    kept = [source for source in search.sources if not is_made(source)]
    jobs, problems = _apart(kept, outputs, bool(options.output))
    chosen = []
    for source, paths in jobs:
        form = options.format or format_of(source.file)
        chosen.append(Job(source.file, form, {kind: paths[kind] for kind in options.save}))
    return Plan(chosen, search.problems + problems, earlier, search.unread)


def _pictures(folder: Path) -> list[Path]:
    """The files of a folder that may be photographs, none if it can't be read."""
    from dereflect.util.formats import SUFFIXES

    try:
        return [file for file in folder.iterdir() if file.suffix.lower() in SUFFIXES and file.name[0] != "."]
    except OSError:
        return []


def _made_elsewhere(source: Source, folders: dict[str, list[Path]]) -> bool:
    """Whether an earlier call with an -o inside the folder has made a file: it has mirrored the folder there."""
    stem, place = source.file.stem, source.folder
    names = [stem.removesuffix(f"_{end}") for end in ENDS if stem.endswith(f"_{end}")]
    return any(
        place != folder and place.parts[len(place.parts) - len(folder.parts) :] == folder.parts
        for name in names
        for folder in folders.get(name, ())
    )


def _apart(
    sources: list[Source], outputs: Callable[[Source, Path], dict[str, Path]], in_one: bool
) -> tuple[list[tuple[Source, dict[str, Path]]], list[str]]:
    """The outputs of each source; those of one name go into folders named as their own, as deep as it takes."""
    jobs = [(source, outputs(source, Path())) for source in sources]
    for depth in range(1, 5) if in_one else ():
        counts = Counter(made["t"] for _, made in jobs)
        for number, (source, made) in enumerate(jobs):
            if counts[made["t"]] > 1:
                jobs[number] = source, outputs(source, Path(*source.file.absolute().parent.parts[1:][-depth:]))
    counts = Counter(made["t"] for _, made in jobs)
    problems = [
        f"{source.file}: another photograph would become {made['t']}, too; separate it by itself"
        for source, made in jobs
        if counts[made["t"]] > 1
    ]
    return [(source, made) for source, made in jobs if counts[made["t"]] == 1], problems

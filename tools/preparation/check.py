"""What a data folder holds, compared with what was published."""

import hashlib
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from dereflect.data.folders import PAIR_SETS, PHOTOGRAPHS, check_name, find_images, find_pairs, find_test_sets
from dereflect.util import tables
from dereflect.util.errors import UserError, printable
from dereflect.util.images import read_rgb
from dereflect.util.progress import track
from dereflect.util.published import REAL20, TEST_SETS, TRAIN_COUNTS

_PUBLISHED = TRAIN_COUNTS | {name: found.images for name, found in TEST_SETS.items()}
_THREADS = 4  # decoding releases Python's lock
_MOST_LINES = 50


@dataclass
class Part:
    """One of the sets.

    Attributes:
        train: whether it is trained on.
        count: of photographs or pairs.
        files: of all its images.
        problems: a line for each file that can't be used.
        differences: a line for each difference from the published set.
    """

    name: str
    place: Path
    train: bool
    count: int
    files: list[Path]
    problems: list[str] = field(default_factory=list)
    differences: list[str] = field(default_factory=list)


def check(base: Path, published: bool) -> int:
    """Print a table of all sets and a line for each problem.

    Args:
        base: the data.
        published: whether differences from the published sets count as problems.

    Returns:
        1 if there is a problem, else 0.

    Raises:
        UserError: there is no such folder.
    """
    if not base.is_dir():
        raise UserError(f"{base}: there is no such folder; name the data's, as in --base_dir of train_sirs.py")
    parts = _parts(base)
    sizes, hashes = _decode(base, parts)
    for part in parts:
        part.problems += [] if part.name == "photographs" else _unequal(part, sizes)
    copies = _copies(parts, hashes)
    print(_table(parts, sizes))
    differences = [f"{part.name}: {what}" for part in parts for what in part.differences]
    troubles = [problem for part in parts for problem in part.problems] + copies
    _list("differs from what was published", differences)
    _list("trouble", troubles)
    if not troubles:
        print("Every file can be used, and no test image is among the training's.")
    return int(bool(troubles or (published and differences)))


def _parts(base: Path) -> list[Part]:
    """The published sets, there or not, then all further test sets."""
    photographs = find_images(base / PHOTOGRAPHS)
    parts = [Part("photographs", base / PHOTOGRAPHS, True, len(photographs), photographs)]
    parts += [_pairs_of(name, base / place, train=True) for name, place in PAIR_SETS.items()]
    tests = {name: _pairs_of(name, place, train=False) for name, place in find_test_sets(base / "test").items()}
    absent = [Part(name, base / "test" / name, False, 0, []) for name in TEST_SETS if name not in tests]
    parts += sorted([*tests.values(), *absent], key=lambda part: (part.name not in TEST_SETS, part.name))
    for part in parts:
        wanted = _PUBLISHED.get(part.name, part.count)
        if part.count != wanted:
            part.differences.append(f"{part.count or 'none'} of {wanted} there")
    return parts


def _pairs_of(name: str, place: Path, train: bool) -> Part:
    problems: list[str] = []
    pairs = find_pairs(place, problems)
    part = Part(name, place, train, len(pairs), [file for pair in pairs for file in pair.files], problems)
    names = {pair.name for pair in pairs}
    if name == "real20_420" and names != set(REAL20):
        missing = " ".join(wanted for wanted in REAL20 if wanted not in names)
        part.differences.append(f"not the published images; missing: {missing or 'none'}")
    return part


def _decode(base: Path, parts: list[Part]) -> tuple[dict[Path, tuple[int, int]], dict[Path, bytes]]:
    """Sizes of all images, and hashes of their pixels; what can't be decoded is added to its set's problems."""
    sizes, hashes = {}, {}
    files = [(part, file) for part in parts for file in part.files]
    with ThreadPoolExecutor(_THREADS) as pool:
        outcomes = pool.map(partial(_fingerprint, base), (file for _, file in files))
        for (part, file), outcome in track(zip(files, outcomes, strict=True), "decoding images", len(files)):
            if isinstance(outcome, str):
                part.problems.append(outcome)
            else:
                sizes[file], hashes[file] = outcome
    return sizes, hashes


def _fingerprint(base: Path, file: Path) -> tuple[tuple[int, int], bytes] | str:
    """Size and a hash of the pixels, or what is wrong with the file."""
    try:
        check_name(base, file)
        image = read_rgb(file)
    except UserError as error:
        return str(error)
    return image.size, hashlib.blake2b(image.tobytes(), digest_size=16, key=repr(image.size).encode()).digest()


def _unequal(part: Part, sizes: dict[Path, tuple[int, int]]) -> list[str]:
    """A line for each file whose size differs from its mixture's."""
    problems = []
    for pair in find_pairs(part.place, []):
        wanted = sizes.get(pair.mixture)
        for file in pair.files[1:]:
            if wanted and file in sizes and sizes[file] != wanted:
                problems.append(f"{file}: {_by(sizes[file])} pixels, but {pair.mixture} has {_by(wanted)}")
    return problems


def _copies(parts: list[Part], hashes: dict[Path, bytes]) -> list[str]:
    """A line for each training image that has the same pixels as a test image."""
    tests: dict[bytes, list[Path]] = defaultdict(list)
    for part in parts:
        if not part.train:
            for file in part.files:
                if file in hashes:
                    tests[hashes[file]].append(file)
    trained = [file for part in parts if part.train for file in part.files if file in hashes]
    return [f"{file}: the same picture as the test's {test}" for file in trained for test in tests[hashes[file]]]


def _table(parts: list[Part], sizes: dict[Path, tuple[int, int]]) -> str:
    rows = [("set", "for", "images", "published", "sizes", "trouble")]
    for part in parts:
        use = "training" if part.train else "test"
        count = str(part.count) if part.name == "photographs" else f"{part.count} pairs"
        wanted = str(_PUBLISHED.get(part.name, "-"))
        rows.append((printable(part.name), use, count, wanted, _range(part, sizes), str(len(part.problems))))
    return tables.as_text(rows, rule=False)


def _range(part: Part, sizes: dict[Path, tuple[int, int]]) -> str:
    found = sorted({sizes[file] for file in part.files if file in sizes}, key=lambda size: size[0] * size[1])
    if not found:
        return "-"
    return _by(found[0]) if len(found) == 1 else f"{_by(found[0])} to {_by(found[-1])}"


def _by(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"


def _list(title: str, lines: list[str]) -> None:
    if lines:
        print(f"\n{title} ({len(lines)}):")
        print("\n".join(f"  {printable(line)}" for line in lines[:_MOST_LINES]))
        if len(lines) > _MOST_LINES:
            print(f"  ... and {len(lines) - _MOST_LINES} more")

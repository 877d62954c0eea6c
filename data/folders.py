"""The folder layout: which photographs, training pairs and test sets exist, and whether their files can be used."""

import hashlib
import os
import unicodedata
from argparse import Namespace
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from tqdm import tqdm

from dereflect.util.errors import UserError, printable
from dereflect.util.formats import UNREAD_SUFFIXES
from dereflect.util.images import SUFFIXES, check_image
from dereflect.util.published import TEST_SETS

PHOTOGRAPHS = Path("train/VOCdevkit/VOC2012/PNGImages")
PAIR_SETS = {"real": Path("train/real"), "nature": Path("train/nature")}
_MIX, _MIX_WITHOUT_NATURE = (0.6, 0.2, 0.2), (0.7, 0.3, 0.0)  # published
SOURCES = ("synthetic", *PAIR_SETS)  # in the order of --mix
MIXTURE, TRANSMISSION, REFLECTION = LAYERS = ("blended", "transmission_layer", "reflection_layer")

_LAYOUT = f"""Expected below it, any part of which may be missing:
  {PHOTOGRAPHS}/  photographs
  {PAIR_SETS["real"]}/{{blended,transmission_layer}}/  pairs of the same name
  {PAIR_SETS["nature"]}/{{blended,transmission_layer}}/  pairs of the same name
  test/ANY/NAME/{{blended,transmission_layer[,reflection_layer]}}/  pairs to test on"""
_MOST_PROBLEMS = 50
_LEAST_SIDE = 7  # pixels of a test image: SSIM's window, see `util.metrics`
_CHECKERS = 4  # threads: checking mostly waits for the disk
_PATIENCE = 2.0  # seconds before a progress bar is worth showing


@dataclass(frozen=True)
class Pair:
    """A mixture, its transmission and perhaps its reflection; `name` is the stem that the files share."""

    name: str
    mixture: Path
    transmission: Path
    reflection: Path | None = None

    @property
    def files(self) -> list[Path]:
        """All files of the pair, the mixture first."""
        return [file for file in (self.mixture, self.transmission, self.reflection) if file]


@dataclass(frozen=True)
class Sets:
    """The images to train and to test on.

    Attributes:
        photographs: sources of synthetic pairs.
        pairs: training pairs of `real` and `nature`, without the held-out ones.
        validation: pairs held out of training.
        tests: pairs of each test set.
        mix: share of each source that exists and is used, in the order of --mix; the sum is 1.
        missing: messages about sets that don't exist.
        image_sizes: width and height of every image.
        left_out: messages about files that can't be used and that --skip_bad_images leaves out.
    """

    photographs: list[Path]
    pairs: dict[str, list[Pair]]
    validation: list[Pair]
    tests: dict[str, list[Pair]]
    mix: dict[str, float]
    missing: list[str]
    image_sizes: dict[Path, tuple[int, int]]
    left_out: list[str] = field(default_factory=list)

    @property
    def sizes(self) -> dict[str, int]:
        """Number of training samples in each source of the mix."""
        held = _count(self.photographs, self.pairs)
        return {source: held[source] for source in self.mix}

    def describe(self) -> list[str]:
        """Lines for the log: the sets, their mix, and what is missing."""
        lines = []
        if self.mix:
            parts = (f"{source} {size} ({self.mix[source]:.0%})" for source, size in self.sizes.items())
            lines.append(f"training samples: {', '.join(parts)}; {len(self.validation)} pairs held out")
        if self.tests:
            lines.append("test images: " + ", ".join(f"{name} {len(pairs)}" for name, pairs in self.tests.items()))
        if self.left_out:
            lines.append(f"WARNING: {_listed(self.left_out, 'cannot be used and are left out')}")
            lines.append("WARNING: figures of a test set that lacks images don't compare with those of the whole set.")
        return lines + self.missing


def discover(options: Namespace) -> Sets:
    """Find, pair and check all images below --base_dir.

    Test images and held-out ones are decoded, because an evaluation stops at a damaged image. Of photographs and
    training pairs, which are many, only the beginning and the end of each file are checked.

    Args:
        options: base_dir, max_dataset_size, demo, skip_bad_images, if_align and nEpochs are used; mix, val_split
            and best_by, too, if nEpochs is above 0 (otherwise the training sets are not even looked for).

    Returns:
        The sets that exist.

    Raises:
        UserError: there is nothing to do what was asked for, or there are files that cannot be used (damaged images,
            images without a partner, pairs of different size, test images too small to be measured, names that no
            record could hold) and are not to be skipped, all of which the one message lists.
    """
    base, limit = options.base_dir, options.max_dataset_size
    problems: list[str] = []
    photographs: list[Path] = []
    pairs: dict[str, list[Pair]] = {}
    validation: list[Pair] = []
    unread: list[Path] = []
    training = options.nEpochs > 0
    if training:
        photographs = find_images(base / PHOTOGRAPHS, unread)[:limit]
        for name, folder in PAIR_SETS.items():
            found = find_pairs(base / folder, problems, unread)[:limit]
            held_out = _held_out(found, options.val_split)
            validation += [pair for pair in found if pair in held_out]
            pairs[name] = [pair for pair in found if pair not in held_out]
    test_folders = find_test_sets(base / "test")
    tests = {name: find_pairs(folder, problems, unread)[:limit] for name, folder in test_folders.items()}
    decoded = [*validation, *(pair for found in tests.values() for pair in found)]
    glanced = [pair for found in pairs.values() for pair in found]
    image_sizes, unusable = _check(base, photographs, glanced, decoded)
    if not options.if_align:  # which makes them larger
        unusable |= _too_small(decoded, image_sizes)
    problems += unusable.values()
    if not options.skip_bad_images and problems:
        raise UserError(f"--base_dir {base}: {_listed(problems, 'cannot be used')}")

    def usable(found: list[Pair]) -> list[Pair]:
        return [pair for pair in found if not any(file in unusable for file in pair.files)]

    photographs = [file for file in photographs if file not in unusable]
    pairs = {name: usable(found) for name, found in pairs.items()}
    validation = _named_apart(usable(validation))
    tests = {name: kept for name, found in tests.items() if (kept := usable(found))}
    held = _count(photographs, pairs)
    if not (any(held.values()) if training else tests):
        wanted = "anything to train on" if training else "a test set"
        raise UserError(f"--base_dir {base}: there isn't {wanted}. {_LAYOUT}")
    mix, missing = _mix(held, options) if training else ({}, [])
    missing += _missing_tests(tests, options.demo)
    missing += [
        f"a test set without images, left out: {folder}" for name, folder in test_folders.items() if name not in tests
    ]
    if training and not (validation if options.best_by == "val" else tests):
        lacking = "no pair is held out" if options.best_by == "val" else "there is no test set"
        missing.append(f"{lacking}, so no best epoch can be picked: no best.pt is written, last.pt stands for it")
    if unread:
        names = ", ".join(map(str, unread[:3])) + (", ..." if len(unread) > 3 else "")
        missing.append(f"WARNING: {len(unread)} pictures are of formats that are not read, and left out: {names}")
    return Sets(photographs, pairs, validation, tests, mix, missing, image_sizes, problems)


def _listed(problems: list[str], what: str) -> str:
    """A headline and a line for each problem, at most as many as fit on a screen."""
    more = [f"... and {len(problems) - _MOST_PROBLEMS} more"] if len(problems) > _MOST_PROBLEMS else []
    lines = [f"{len(problems)} files {what}:", *map(printable, problems[:_MOST_PROBLEMS]), *more]
    return "\n  ".join(lines)


def _count(photographs: list[Path], pairs: dict[str, list[Pair]]) -> dict[str, int]:
    """Number of samples of each source; a synthetic sample takes two photographs."""
    return {"synthetic": len(photographs) // 2, **{name: len(found) for name, found in pairs.items()}}


def find_images(folder: Path, unread: list[Path] | None = None) -> list[Path]:
    """Image files of a folder by name, none where there is no folder; pictures of formats that are not read go to
    `unread`."""
    try:
        files = sorted(folder.iterdir(), key=lambda file: file.name)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"{folder}: cannot be read: {error.strerror}") from error
    files = [file for file in files if not file.name.startswith(".")]
    if unread is not None:
        unread += [file for file in files if file.suffix.lower() in UNREAD_SUFFIXES]
    return [file for file in files if file.suffix.lower() in SUFFIXES]


def find_pairs(folder: Path, problems: list[str], unread: list[Path] | None = None) -> list[Pair]:
    """The pairs of a set by name; what has no partner, or is there twice, goes to `problems`.

    Names are compared in Unicode's normal form C: a Mac takes letters with accents apart, others do not.
    """
    layers, doubled = {}, set()
    for layer in LAYERS:
        files = find_images(folder / layer, unread)
        layers[layer] = {_normal(file.stem): file for file in files}
        for stem, count in Counter(_normal(file.stem) for file in files).items():
            if count > 1:
                doubled.add(stem)
                problems.append(f"{folder / layer / stem}: {count} files of that name")
    # A set may lack all reflections, but not some of them.
    layers = {layer: files for layer, files in layers.items() if files or layer != REFLECTION}
    names = sorted(set().union(*layers.values()))
    complete = []
    for name in names:
        files = {layer: found[name] for layer, found in layers.items() if name in found}
        if name in doubled:
            continue
        if len(files) == len(layers):
            complete.append(Pair(files[MIXTURE].stem, files[MIXTURE], files[TRANSMISSION], files.get(REFLECTION)))
        else:
            lacking = " and ".join(str(folder / layer) for layer in layers if layer not in files)
            problems.append(f"{next(iter(files.values()))}: no image of that name in {lacking}")
    return sorted(complete, key=lambda pair: pair.name)


def _normal(name: str) -> str:
    return unicodedata.normalize("NFC", name)


def find_test_sets(root: Path) -> dict[str, Path]:
    """Every test set below `root`, links followed: name -> folder. Where two folders share a name, it is the path below
    `root`, joined by hyphens.

    Raises:
        UserError: a folder can't be read, or its name is that of something else in the record of a run.
    """
    found, seen = [], set()

    def refuse(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError):
            raise UserError(f"{error.filename}: cannot be read: {error.strerror}") from error

    for place, folders, _ in os.walk(root, followlinks=True, onerror=refuse):
        real = os.path.realpath(place)
        if real in seen:  # a link in a circle
            folders.clear()
            continue
        seen.add(real)
        if {MIXTURE, TRANSMISSION} & set(folders):
            found.append(Path(place))
        folders[:] = sorted(folder for folder in folders if folder not in LAYERS and not folder.startswith("."))
    counts = Counter(folder.name for folder in found)
    named: dict[str, Path] = {}
    for folder in found:
        name = folder.name if counts[folder.name] == 1 else "-".join(folder.relative_to(root).parts) or folder.name
        if name == "val" or name.startswith("average") or name in named:
            taken = named.get(name, "'val' are a run's held-out pairs, and 'average...' its averages")
            raise UserError(f"{folder}: a test set can't be named {name!r} ({taken}); rename the folder")
        named[name] = folder
    return named


def _check(
    base: Path, photographs: list[Path], glanced: list[Pair], decoded: list[Pair]
) -> tuple[dict[Path, tuple[int, int]], dict[Path, str]]:
    """The sizes of usable images, and a message about every other image, for example one whose partner
    has another size."""
    whole = {file for pair in decoded for file in pair.files}
    files = [*photographs, *(file for pair in (*glanced, *decoded) for file in pair.files)]
    sizes, unusable = {}, {}
    with ThreadPoolExecutor(_CHECKERS) as pool:
        outcomes = tqdm(pool.map(partial(_size_or_problem, base, whole), files), "checking images", len(files),
                        leave=False, delay=_PATIENCE, disable=None)  # fmt: skip
        for file, outcome in zip(files, outcomes, strict=True):
            if isinstance(outcome, str):
                unusable[file] = outcome
            else:
                sizes[file] = outcome
    for pair in (*glanced, *decoded):
        for file in pair.files[1:]:
            if file in sizes and sizes.get(pair.mixture, sizes[file]) != sizes[file]:
                (w, h), (expected_w, expected_h) = sizes[file], sizes[pair.mixture]
                unusable[file] = f"{file}: {w}x{h} pixels, but {pair.mixture} has {expected_w}x{expected_h}"
    return sizes, unusable


def _too_small(pairs: list[Pair], sizes: dict[Path, tuple[int, int]]) -> dict[Path, str]:
    """What is wrong with images that are too small to be measured."""
    return {
        file: f"{file}: {sizes[file][0]}x{sizes[file][1]} pixels; SSIM needs {_LEAST_SIDE} a side (or --if_align)"
        for pair in pairs
        for file in pair.files
        if min(sizes.get(file, (_LEAST_SIDE, _LEAST_SIDE))) < _LEAST_SIDE
    }


def _size_or_problem(base: Path, whole: set[Path], file: Path) -> tuple[int, int] | str:
    try:
        check_name(base, file)
        return check_image(file, decoded=file in whole)
    except UserError as error:
        return str(error)


def check_name(base: Path, file: Path) -> None:
    """Raise a UserError if a file below `base` has a name that lists and records can't show unchanged."""
    name = str(file.relative_to(base))
    if name != printable(name):
        raise UserError(f"{printable(file)}: a name with control characters or bytes that aren't UTF-8; rename it")


def _mix(held: dict[str, int], options: Namespace) -> tuple[dict[str, float], list[str]]:
    """The shares of --mix for the sources that exist, and a message about the others.

    The published mix is another one where nature is missing; any other mix is scaled to a sum of 1.
    """
    wanted = dict(zip(SOURCES, options.mix, strict=True))
    alone = not held["nature"] and tuple(options.mix) == _MIX
    shares = dict(zip(SOURCES, _MIX_WITHOUT_NATURE, strict=True)) if alone else wanted
    mix = {source: share for source, share in shares.items() if share and held[source]}
    if not mix:
        there = ", ".join(source for source, count in held.items() if count)
        raise UserError(f"--mix {' '.join(map(str, options.mix))}: nothing for what is there ({there})")
    folders = {"synthetic": PHOTOGRAPHS, **PAIR_SETS}
    absent = [f"{source} ({folders[source]})" for source, share in wanted.items() if share and not held[source]]
    total = sum(mix.values())
    mix = {source: share / total for source, share in mix.items()}
    shares = ", ".join(f"{source} {share:.0%}" for source, share in mix.items())
    return mix, [f"not there to train on: {', '.join(absent)}; the mix becomes {shares}"] if absent else []


def _missing_tests(tests: dict[str, list[Pair]], demo: bool) -> list[str]:
    """A message about the published test sets that don't exist."""
    absent = [name for name in TEST_SETS if name not in tests]
    if demo or not absent:
        return []
    return [f"not there to test on: {', '.join(absent)}"]


def _held_out(pairs: list[Pair], share: float) -> set[Pair]:
    """The pairs to validate on: those whose name has a hash below `share`, so that other files don't matter.

    Of two pairs or more, at least one is held out, and never all.
    """
    if share == 0 or len(pairs) < 2:
        return set()
    ordered = sorted(pairs, key=_position)
    count = sum(_position(pair) < share for pair in pairs)
    return set(ordered[: min(max(count, 1), len(pairs) - 1)])


def _named_apart(pairs: list[Pair]) -> list[Pair]:
    """The pairs, with the names of their sets in front if two of different sets share a name."""
    if len({pair.name for pair in pairs}) == len(pairs):
        return pairs
    return [replace(pair, name=f"{pair.mixture.parents[1].name}-{pair.name}") for pair in pairs]


def _position(pair: Pair) -> float:
    """A name's place in [0, 1)."""
    name = pair.name.encode("utf-8", "surrogateescape")  # a name that isn't UTF-8 is refused later
    return int.from_bytes(hashlib.blake2b(name, digest_size=4).digest(), "big") / 2**32

"""The demo set: deterministic, complete or absent, and honest about train and test."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from dereflect.data import demo
from dereflect.data.demo import TEST_PHOTOGRAPHS, TRAIN_PHOTOGRAPHS, build_demo
from dereflect.options import parse_train
from dereflect.util.errors import UserError
from dereflect.util.images import check_image, read_image


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "deep" / "demo"
    build_demo(folder)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_has_every_part_of_the_published_layout(built):
    from dereflect.data import discover

    sets = discover(parse_train(["--base_dir", str(built)]))
    assert sets.mix == pytest.approx({"synthetic": 0.6, "real": 0.2, "nature": 0.2})
    assert len(sets.photographs) == 40
    assert {name: len(pairs) for name, pairs in sets.tests.items()} == {"demo_clip": 6, "demo_screen": 6}
    assert all(pair.reflection for pairs in sets.tests.values() for pair in pairs)
    width, height = check_image(sets.tests["demo_clip"][0].mixture)
    assert width % 16
    assert height % 16
    assert sum(map(len, contents(built).values())) < 10e6
    assert "synthetic" in (built / "README.txt").read_text()


def test_same_bytes_every_time(built, tmp_path):
    build_demo(tmp_path / "again")
    assert contents(tmp_path / "again") == contents(built)


def test_nothing_happens_where_it_is_complete(built):
    before = {file: file.stat().st_mtime_ns for file in built.rglob("*")}
    build_demo(built)
    assert {file: file.stat().st_mtime_ns for file in built.rglob("*")} == before


def test_train_and_test_share_no_photograph():
    assert not set(TRAIN_PHOTOGRAPHS) & set(TEST_PHOTOGRAPHS)


def test_test_sets_differ_in_how_they_are_mixed(built):
    """A screen blend is a linear mix of T, R and TR whose weights fit; a darkened, clipped sum is not."""
    for name, expected in (("demo_screen", True), ("demo_clip", False)):
        for mixture in sorted((built / "test" / name / "blended").iterdir()):
            i, t, r = (
                read_image(mixture.parent.parent / layer / mixture.name)
                for layer in ("blended", "transmission_layer", "reflection_layer")
            )
            assert (_screen_error(i, t, r) < 2 / 255) == expected, mixture


def _screen_error(i: np.ndarray, t: np.ndarray, r: np.ndarray) -> float:
    """How far a mixture is from the best aT + bR - abTR, a and b free."""
    basis = np.stack([t, r, -t * r], -1).reshape(-1, 3)
    weights = np.linalg.lstsq(basis, i.reshape(-1), rcond=None)[0]
    unlike = abs(weights[0] * weights[1] - weights[2])
    return float(np.abs(basis @ weights - i.reshape(-1)).mean() + unlike)


def test_an_interrupted_build_leaves_nothing(tmp_path, monkeypatch):
    write, count = demo.write_image, iter(range(30))

    def full_disk(path, array):
        if next(count, None) is None:
            raise KeyboardInterrupt
        write(path, array)

    monkeypatch.setattr(demo, "write_image", full_disk)
    with pytest.raises(KeyboardInterrupt):
        build_demo(tmp_path / "demo")
    assert list(tmp_path.iterdir()) == []


def test_an_incomplete_folder_is_not_taken_for_good(built, tmp_path):
    shutil.copytree(built, tmp_path / "demo")
    (tmp_path / "demo" / "README.txt").unlink()
    with pytest.raises(UserError, match="remove it"):
        build_demo(tmp_path / "demo")


def test_another_process_may_have_been_faster(built, tmp_path, monkeypatch):
    def slow(folder):
        shutil.copytree(built, tmp_path / "demo")
        folder.mkdir()

    monkeypatch.setattr(demo, "_write", slow)
    build_demo(tmp_path / "demo")
    assert contents(tmp_path / "demo") == contents(built)


def test_an_unwritable_place_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file/demo: the demo set cannot be written"):
        build_demo(tmp_path / "file" / "demo")

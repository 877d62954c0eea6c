"""tools/app.py: its parts, and the whole in a browser. A stand-in separates, by mirroring the photograph."""

import asyncio
import importlib.util
import os
import signal
import socket
import subprocess
import sys
import threading
import types
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
from PIL import Image, ImageCms

from dereflect.data.demo import write_examples
from dereflect.options import PRETRAINED
from dereflect.tools import app, infer
from dereflect.tools.page import server as page_server
from dereflect.tools.page import work as page_work
from dereflect.tools.page.work import BusyError, Work
from dereflect.util.errors import UserError
from dereflect.util.images import read_image, write_image
from dereflect.util.photographs import Photograph, read_photograph, write_photograph
from tests.page import CHROMIUM, DRIVER, STAND_IN, Page, Server, browser, separated, until
from tests.project import executable

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def stand_in(monkeypatch) -> types.ModuleType:
    monkeypatch.setitem(sys.modules, "dereflect.models.separator", None)  # so that what was there comes back
    exec(STAND_IN, {})
    return sys.modules["dereflect.models.separator"]


@pytest.fixture
def work(stand_in, tmp_path) -> Iterator[Work]:
    (tmp_path / "app").mkdir()
    work = Work(tmp_path / "app", lambda name, *rest: infer.separate_file(stand_in.Mirror(), *rest), 3)
    yield work
    work.close()


@pytest.fixture
def photograph(tmp_path) -> Path:
    path = tmp_path / "photograph.png"
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)
    write_image(path, pixels)
    return path


def python(code: str, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120
    )


def test_help_imports_nothing_heavy():
    done = python(
        "import sys\nfrom dereflect.tools import app\ntry: app.main(['--help'])\n"
        "except SystemExit: assert not {'torch', 'starlette', 'numpy'} & set(sys.modules)"
    )
    assert done.returncode == 0, done.stderr
    assert "--max_megapixels" in done.stdout


def test_without_the_server_it_names_the_requirements():
    done = python(
        "import runpy, sys\nsys.modules['uvicorn'] = None\nsys.argv = ['app.py']\n"
        "runpy.run_path('tools/app.py', run_name='__main__')\n"
    )
    assert done.returncode == 2 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert "pip install -r requirements-app.txt" in line
    assert (ROOT / "requirements-app.txt").read_text().splitlines()[-1] == "-e .[app]"
    assert 'app = ["starlette>=' in (ROOT / "pyproject.toml").read_text()


def test_it_is_this_machines_alone_by_default():
    assert app.parse([]).host == "127.0.0.1"
    with pytest.raises(SystemExit):
        app.parse(["--tile", "100"])


def test_checkpoints_are_found_or_given_the_bundled_one_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    bundled = f"{PRETRAINED.stem} (bundled)"
    assert app.find_checkpoints(None) == {bundled: PRETRAINED}
    for age, name in enumerate(("new", "older", "oldest")):
        path = Path("checkpoints") / name / "best.pt"
        executable(path, "")
        os.utime(path, (1e9 - age, 1e9 - age))
        executable(path.with_name("last.pt"), "")
    executable(tmp_path / "published.pt", "")
    assert list(app.find_checkpoints(None)) == [bundled, "new", "older", "oldest"]
    without_pairs = Path("checkpoints/photographs/last.pt")
    executable(without_pairs, "")
    assert app.find_checkpoints(None)["photographs"] == without_pairs
    given = [Path("published.pt"), tmp_path / "checkpoints/new/best.pt", PRETRAINED]
    assert app.find_checkpoints(given) == {bundled: PRETRAINED, "published.pt": given[0], "new": given[1]}
    with pytest.raises(UserError, match=r"--checkpoint absent\.pt: there is no such file"):
        app.find_checkpoints([Path("absent.pt")])


def test_two_checkpoints_of_one_name_can_be_told_apart(tmp_path):
    paths = [tmp_path / folder / "checkpoints/run/best.pt" for folder in ("one", "other")]
    for path in paths:
        executable(path, "")
    assert list(app.find_checkpoints(paths))[1:] == [str(path) for path in paths]


def test_the_checkpoint_used_last_stays_loaded(stand_in):
    settings = {"vgg_weights": None, "precision": "bf16", "gpu_ids": None, "tile": 512, "strength": 0.5}
    options = Namespace(inet="net", checkpoint=None, **settings)
    checkpoints = {"bundled": PRETRAINED, "a": Path("a/best.pt"), "b": Path("b/best.pt")}
    separators = app.Separators(checkpoints, options)
    assert separators.chosen == "bundled"
    for name in ("a", "a", "b", "bundled"):
        separators.load(name)
    # The bundled one is itself, whatever network the others are said to be. The page's slider is the strength.
    nets = [(loaded[0], *loaded[3:]) for loaded in stand_in.loaded]
    assert nets == [("a", "net", 1.0), ("b", "net", 1.0), (PRETRAINED.parent.name, None, 1.0)]
    assert all(loaded[1:3] == ("bf16", 512) for loaded in stand_in.loaded)
    options.checkpoint = [Path("a/best.pt")]
    assert app.Separators(checkpoints, options).chosen == "a"


def test_a_port_that_is_taken_and_a_host_that_is_none():
    for host in ("n" * 300, "..", "x" * 64 + ".y", "\udce9", "256.1.1.1"):
        with pytest.raises(UserError, match="--port 0: cannot listen there"):
            page_server.listen(host, 0)
    with socket.create_server(("127.0.0.1", 0)) as door:
        port = door.getsockname()[1]
        with pytest.raises(UserError, match=f"--host 127.0.0.1 --port {port}: cannot listen there"):
            page_server.listen("127.0.0.1", port)
    with pytest.raises(UserError, match="--port 70000"):
        page_server.listen("127.0.0.1", 70000)


@pytest.mark.parametrize(("count", "ended"), [(20, 0), (40, 40)])
def test_of_many_who_are_slow_none_is_waited_for_long(work, count, ended):
    """Else they would take all connections that there are, for as long as one of them may be slow."""
    connections = [Mock(cycle=None) for _ in range(count)]
    server = Namespace(should_exit=False, server_state=Namespace(connections=connections))
    with pytest.raises(asyncio.TimeoutError):
        asyncio.run(asyncio.wait_for(page_server._tend(server, work), 2.2))
    assert sum(connection.transport.abort.called for connection in connections) == ended


def test_examples_are_the_same_every_time(tmp_path):
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
    first, second = (write_examples(tmp_path / name) for name in ("one", "other"))
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]
    assert len({path.read_bytes() for path in first}) == 4


# What becomes of a photograph.


def test_a_photograph_becomes_files(work, photograph):
    sent = separated(work, photograph)
    assert sent.state == "done", sent.about
    assert (sent.about["width"], sent.about["height"], sent.about["notes"]) == (60, 40, [])
    mixture = read_image(photograph)
    assert np.array_equal(read_image(sent.folder / "transmission.png"), mixture[:, ::-1])
    reflection = read_image(sent.folder / "reflection.png")
    assert np.abs(reflection - np.clip(mixture - 0.5, 0, 1)).max() <= 0.5 / 255 + 1e-6  # rounded to 8 bits
    assert read_image(sent.folder / "before.jpg").shape == mixture.shape
    assert sent.bytes == sum(path.stat().st_size for path in sent.folder.iterdir())


@pytest.fixture
def deep(tmp_path) -> Path:
    """A photograph of 16 bits with profile, EXIF, alpha."""
    exif = Image.Exif()
    exif[271] = "A camera"
    icc = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    pixels, alpha = np.split(np.random.default_rng(0).integers(0, 2**16, (40, 60, 4), np.uint16), [3], axis=2)
    path = tmp_path / "deep.png"
    write_photograph(path, pixels, Photograph(pixels, alpha[:, :, 0], icc, exif.tobytes()), "png")
    return path


def test_results_keep_what_the_photograph_says(work, stand_in, deep, tmp_path):
    """Profile, EXIF, alpha and 16 bits, exactly as tools/infer.py keeps them."""
    sent = separated(work, deep)
    outputs = {"t": tmp_path / "t.png", "r": tmp_path / "r.png"}
    infer.separate_file(stand_in.Mirror(), infer.Job(deep, "png", outputs))
    for name, path in zip(page_work.LAYERS, outputs.values(), strict=True):
        assert work.open_result(sent, name, 1).read() == path.read_bytes()
    like, made = read_photograph(deep), read_photograph(sent.folder / "transmission.png")
    assert np.array_equal(made.pixels, like.pixels[:, ::-1]) and made.pixels.dtype == np.uint16
    assert np.array_equal(made.alpha, like.alpha) and made.icc == like.icc
    assert Image.open(sent.folder / "transmission.png").getexif()[271] == "A camera"
    for name in page_work.PREVIEWS:
        assert read_photograph(sent.folder / name).icc == like.icc, "what the slider compares has the same colours"


@pytest.mark.parametrize("strength", [0, 0.3, 0.7])
def test_less_strength_is_computed_at_full_depth(work, deep, tmp_path, strength):
    sent = separated(work, deep)
    (tmp_path / "weaker.png").write_bytes(work.open_result(sent, "transmission.png", strength).read())
    mixture, made = read_photograph(deep), read_photograph(tmp_path / "weaker.png")
    right = mixture.pixels + strength * (mixture.pixels[:, ::-1].astype(float) - mixture.pixels)
    assert made.pixels.dtype == np.uint16 and np.abs(made.pixels - right).max() <= 0.51  # of 65535
    assert np.array_equal(made.alpha, mixture.alpha) and (made.icc, made.exif) == (mixture.icc, mixture.exif)
    assert sent.bytes == sum(path.stat().st_size for path in sent.folder.iterdir())


def test_a_large_photograph_has_smaller_previews(work, tmp_path):
    Image.new("RGB", (5000, 10)).save(tmp_path / "wide.png")
    sent = separated(work, tmp_path / "wide.png")
    sizes = [read_photograph(sent.folder / name).pixels.shape[1] for name in ("before.jpg", "transmission.png")]
    assert sizes == [2048, 5000]


def test_what_is_wrong_is_told_without_the_names_of_files(work, photograph, tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    path = tmp_path / "bad"
    for content, told in (
        (b"no image", "not an image, or damaged"),
        (photograph.read_bytes(), "more than 2,000 pixels"),
    ):
        path.write_bytes(content)
        with pytest.raises(UserError) as error:
            separated(work, path)
        assert str(error.value).startswith(told)
    monkeypatch.undo()
    Image.open(photograph).save(path, "JPEG")
    path.write_bytes(path.read_bytes()[:1500])
    sent = separated(work, path)
    assert sent.state == "failed" and "truncated" in sent.about["error"] and not sent.folder.exists()


# The files that are kept.


def test_the_oldest_results_make_room(work, photograph, tmp_path, monkeypatch):
    first, second = separated(work, photograph), separated(work, photograph)
    monkeypatch.setattr(page_work, "MOST_RESULTS", 2)
    third = separated(work, photograph)
    assert not first.folder.exists() and work.find(first.token) is None and second.folder.exists()
    monkeypatch.setattr(page_work, "MOST_BYTES", 2 * third.bytes)  # enough for one and what it may come to take
    fourth = separated(work, photograph)
    assert fourth.state == "done", fourth.about
    assert not second.folder.exists() and not third.folder.exists()
    assert sorted(path.name for path in (tmp_path / "app").iterdir()) == [fourth.token]
    monkeypatch.setattr(page_work, "MOST_BYTES", 1000)
    with pytest.raises(BusyError):
        work.begin("some", 2000)
    assert not list((tmp_path / "app").iterdir())


def test_old_results_go(work, photograph, monkeypatch):
    sent, coming = separated(work, photograph), work.begin("some", 10)
    work.sweep()
    assert sent.folder.exists()
    monkeypatch.setattr(page_work, "KEPT", -1)
    work.sweep()
    assert not sent.folder.exists() and work.find(sent.token) is None and coming.folder.exists()


def test_places_are_few_and_what_is_deleted_in_work_leaves_nothing(photograph, tmp_path):
    gate, seen = threading.Event(), []

    def wait(name, job, refuse, note, watch):
        for tile in watch(range(9), 9):
            seen.append(tile)
            gate.wait(30)
        raise AssertionError("it was deleted")

    work = Work(tmp_path, wait, 2)
    both = [work.begin("some", 10) for _ in range(2)]
    with pytest.raises(BusyError, match="too many photographs are waiting"):
        work.begin("some", 10)
    for sent in both:
        sent.file.write_bytes(photograph.read_bytes())
        work.submit(sent)
    until(lambda: seen, "the first tile")
    assert work.status(both[0]) == {"state": "working", "ahead": 0, "tile": 0, "tiles": 9}
    assert work.status(both[1]) == {"state": "waiting", "ahead": 1}
    for sent in both:
        work.forget(sent)
    gate.set()
    until(lambda: not both[0].pending, "its end")
    assert seen == [0] and {path.name for path in tmp_path.iterdir()} == {photograph.name}
    assert work.begin("some", 10).token not in {sent.token for sent in both}


@pytest.mark.parametrize("last", ["reflection.jpg", "blended.png"])
def test_what_is_deleted_while_its_files_are_written_leaves_nothing(work, photograph, tmp_path, monkeypatch, last):
    """Neither with the last file of the separation nor with that of less strength."""

    def write(path, *arguments):
        write_photograph(path, *arguments)
        if path.name == last:
            work.forget(next(iter(work._sent.values())))
            path.parent.mkdir()  # as it stays where a file comes between the emptying of a folder and its end
            path.touch()

    monkeypatch.setattr(page_work, "write_photograph", write)
    sent = separated(work, photograph)
    if last == "blended.png":
        with pytest.raises(FileNotFoundError):
            work.open_result(sent, "transmission.png", 0.5)
    until(lambda: not work._working, "its end")
    assert not list((tmp_path / "app").iterdir())


# In a browser.


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[Server]:
    if importlib.util.find_spec("uvicorn") is None:
        pytest.skip("needs requirements-app.txt")
    server = Server(tmp_path_factory.mktemp("served"))
    yield server
    if server.process.poll() is None:
        server.stop()


@pytest.fixture(scope="module")
def page(server, tmp_path_factory) -> Iterator[Page]:
    pytest.importorskip("selenium")
    if not (CHROMIUM and DRIVER):
        pytest.skip("needs chromium and chromedriver")
    with browser(server.url, tmp_path_factory.mktemp("browser")) as page:
        yield page


def test_photographs_are_separated_compared_and_downloaded(page, server, photograph, tmp_path):
    other = tmp_path / "<b>other.jpeg"
    Image.open(photograph).save(other)
    page.open()
    page.drop(photograph, other)
    first, second = page.separated(2)
    assert "60 × 40 pixels in " in first.text and "<b>other.jpeg" in second.text, "names are text"
    page.do("arguments[0].querySelector('.strength input').value = 70", first)
    page.do("arguments[0].querySelector('.strength input').dispatchEvent(new Event('input'))", first)
    layer = first.find_element("css selector", "img.transmission")
    page.until(lambda: layer.get_property("naturalWidth") == 60, "the preview")
    assert layer.value_of_css_property("opacity") == "0.7"
    assert "inset(0px 0px 0px 50%)" in first.find_element("css selector", ".after").value_of_css_property("clip-path")
    saves = first.find_elements("css selector", ".save")
    for save, name in zip(saves, ("photograph-behind-the-glass-70.png", "photograph-reflection.png"), strict=True):
        save.click()
        page.until((page.downloads / name).is_file, name)
    mixture, weaker = read_image(photograph), read_image(page.downloads / "photograph-behind-the-glass-70.png")
    assert np.abs(weaker - (0.3 * mixture + 0.7 * mixture[:, ::-1])).max() <= 0.51 / 255
    # Everything that was loaded came from here, and the policy let all of it in.
    loaded = page.do("return performance.getEntriesByType('resource').map(entry => entry.name)")
    assert loaded and all(address.startswith((page.url, "blob:")) for address in loaded)
    assert not [entry for entry in page.driver.get_log("browser") if entry["level"] == "SEVERE"]
    second.find_element("css selector", ".remove").click()
    page.until(lambda: len(server.photographs()) == 1, "the end of one")
    page.driver.get("about:blank")
    page.until(lambda: not server.photographs(), "the end of all")


def test_what_is_wrong_is_told_on_the_page(page, photograph, tmp_path):
    bad = {name: tmp_path / f"{name}.png" for name in ("text", "truncated", "huge", "heavy", "empty")}
    bad["text"].write_text("no image")
    bad["truncated"].write_bytes(photograph.read_bytes()[:2000])
    Image.new("L", (1500, 1000)).save(bad["huge"])  # 1.5 megapixels, some kilobytes
    bad["heavy"].write_bytes(bytes(1_100_000))
    bad["empty"].touch()
    page.open()
    page.drop(*bad.values())
    shown = [article.text for article in page.separated(5)]
    told = (
        "not an image, or damaged",
        "truncated",
        "more than 1,000,000 pixels; scale it down",
        "Larger than 1 megabytes",
    )
    for text, name, line in zip(shown, bad, (*told, "an empty file"), strict=True):
        assert f"{name}.png" in text and line in text


def test_an_example_with_other_weights_and_with_damaged_ones(page):
    page.open()
    choices = [choice.text for choice in page.find("#weights option")]
    assert choices == ["madsrnet_xs (bundled)", "first", "second", "damaged"]
    for count, name in enumerate(("second", "damaged"), 1):
        page.find("#weights")[0].send_keys(name)
        page.until(lambda: page.find("#examples button"), "the examples")[0].click()
        page.separated(count)
    assert "with second" in page.text() and "damaged/best.pt: not a checkpoint" in page.text()


def test_sigterm_leaves_nothing(server):
    """The last one: it ends the server."""
    server.separate((server.own / "example_1_soft.jpg").read_bytes())
    assert server.stop() == (128 + signal.SIGTERM, "stopped by SIGTERM\n")
    assert not list(server.temporary.glob("sirr*"))

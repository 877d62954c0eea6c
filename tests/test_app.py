"""The page: its parts, and the whole in a browser. A stand-in separates, by mirroring the photograph."""

import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import types
import urllib.error
import urllib.request
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from data.demo import write_examples
from options import PRETRAINED
from tests.page import STAND_IN, Page, Server
from tests.project import executable
from tools import app, infer
from tools.page.visits import Visits
from util.errors import UserError
from util.images import read_image, write_image
from util.photographs import Photograph, read_photograph, write_photograph

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def stand_in(monkeypatch) -> types.ModuleType:
    monkeypatch.setitem(sys.modules, "models.separator", None)  # so that what was there comes back
    exec(STAND_IN, {})
    return sys.modules["models.separator"]


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
        "import sys\nfrom tools import app\ntry: app.main(['--help'])\n"
        "except SystemExit: assert not {'torch', 'gradio', 'numpy'} & set(sys.modules)"
    )
    assert done.returncode == 0, done.stderr
    assert "--max_megapixels" in done.stdout


def test_without_gradio_it_names_the_requirements():
    done = python(
        "import runpy, sys\nsys.modules['gradio'] = None\nsys.argv = ['app.py']\n"
        "runpy.run_path('tools/app.py', run_name='__main__')\n"
    )
    assert done.returncode == 2 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert "pip install -r requirements-app.txt" in line
    assert "gradio>=" in (ROOT / "requirements-app.txt").read_text()


def test_it_is_this_machines_alone_by_default():
    assert app.parse([]).host == "127.0.0.1"
    with pytest.raises(SystemExit):
        app.parse(["--tile", "100"])


def test_checkpoints_are_found_the_newest_first_or_given(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert app.find_checkpoints(None) == {"madsrnet_xs (bundled)": PRETRAINED}
    for age, name in enumerate(("new", "older", "oldest")):
        path = Path("checkpoints") / name / "best.pt"
        executable(path, "")
        os.utime(path, (1e9 - age, 1e9 - age))
    executable(tmp_path / "published.pt", "")
    assert list(app.find_checkpoints(None)) == ["new", "older", "oldest", "madsrnet_xs (bundled)"]
    given = [Path("published.pt"), tmp_path / "checkpoints/new/best.pt"]
    assert app.find_checkpoints(given) == {"published.pt": given[0], "new": given[1]}
    with pytest.raises(UserError, match=r"--checkpoint absent\.pt: there is no such file"):
        app.find_checkpoints([Path("absent.pt")])


def test_two_checkpoints_of_one_name_can_be_told_apart(tmp_path):
    paths = [tmp_path / folder / "checkpoints/run/best.pt" for folder in ("one", "other")]
    for path in paths:
        executable(path, "")
    assert app.find_checkpoints(paths) == {str(path): path for path in paths}


def test_the_checkpoint_used_last_stays_loaded(stand_in):
    options = Namespace(inet=None, vgg_weights=None, precision="bf16", gpu_ids=None, tile=512)
    separators = app.Separators({name: Path(name) / "best.pt" for name in ("a", "b")}, options)
    for name in ("a", "a", "b", "a"):
        separators.get(name)
    assert stand_in.loaded == [("a", "bf16", 512), ("b", "bf16", 512), ("a", "bf16", 512)]


def test_what_a_visit_leaves_goes_with_it(tmp_path):
    visits = Visits(tmp_path / "results")
    upload, shared = tmp_path / "upload", tmp_path / "shared"
    for visit, path in (("a", upload), ("a", shared), ("b", shared)):
        path.touch()
        visits.uploaded(visit, path)
    first, other = visits.results("a"), visits.results("b")
    assert visits.results("a").is_dir() and not first.exists()  # the visit's newest results only
    visits.end("a")
    assert not upload.exists() and shared.exists() and other.is_dir()
    assert list(visits.folder.iterdir()) == [other]
    visits.end_old(3600)
    assert other.is_dir()
    visits.end_old(-1)
    visits.end("b")
    assert not shared.exists() and not list(visits.folder.iterdir())


def test_a_photograph_becomes_files(stand_in, photograph, tmp_path):
    separator = stand_in.load_separator(tmp_path)
    before, transmission, reflection, told = app.separate_upload(separator, photograph, tmp_path)
    assert told.startswith("60 × 40 pixels in ")
    mixture = read_image(photograph)
    assert np.array_equal(read_image(transmission), mixture[:, ::-1])
    assert np.abs(read_image(reflection) - np.clip(mixture - 0.5, 0, 1)).max() <= 0.5 / 255 + 1e-6  # rounded to 8 bits
    assert transmission.name == "photograph-transmission.png" and read_image(before).shape == mixture.shape


def test_results_keep_what_the_photograph_says(stand_in, tmp_path):
    """Profile, EXIF, alpha and 16 bits, exactly as tools/infer.py keeps them."""
    exif = Image.Exif()
    exif[271] = "A camera"
    icc = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    pixels, alpha = np.split(np.random.default_rng(0).integers(0, 2**16, (40, 60, 4), np.uint16), [3], axis=2)
    like = Photograph(pixels, alpha[:, :, 0], icc, exif.tobytes())
    path = tmp_path / "deep.png"
    write_photograph(path, pixels, like, "png")
    separator = stand_in.load_separator(tmp_path)
    before, transmission, reflection, _ = app.separate_upload(separator, path, tmp_path)
    infer.separate_file(separator, infer.Job(path, "png", {"t": tmp_path / "t.png", "r": tmp_path / "r.png"}))
    assert transmission.read_bytes() == (tmp_path / "t.png").read_bytes()
    assert reflection.read_bytes() == (tmp_path / "r.png").read_bytes()
    made = read_photograph(transmission)
    assert np.array_equal(made.pixels, pixels[:, ::-1]) and made.pixels.dtype == np.uint16
    assert np.array_equal(made.alpha, like.alpha) and made.icc == icc
    assert Image.open(transmission).getexif()[271] == "A camera"
    assert read_photograph(before).icc == icc, "what the slider compares has the same colours"


@pytest.fixture
def bad(photograph, tmp_path) -> dict[str, Path]:
    """Files that are refused, by what is said."""
    paths = {name: tmp_path / f"{name}.png" for name in ("text", "truncated", "huge", "heavy")}
    paths["text"].write_text("no image")
    paths["truncated"].write_bytes(photograph.read_bytes()[:2000])
    Image.new("L", (1500, 1000)).save(paths["huge"])  # 1.5 megapixels, some kilobytes
    paths["heavy"].write_bytes(bytes(1_100_000))
    return {
        "text.png: not an image, or damaged": paths["text"],
        "truncated.png: truncated": paths["truncated"],
        "huge.png: more than 1,000,000 pixels; scale it down": paths["huge"],
        "exceed the maximum allowed size of 1.0 Mb": paths["heavy"],
    }


def test_what_is_wrong_with_a_photograph_is_told_under_its_name(stand_in, bad, tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500_000)
    for told, path in list(bad.items())[:3]:
        with pytest.raises(UserError) as error:
            app.separate_upload(stand_in.load_separator(tmp_path), path, tmp_path)
        assert str(error.value).startswith(told)


def test_a_port_that_is_taken():
    with socket.create_server(("127.0.0.1", 0)) as door:
        port = door.getsockname()[1]
        with pytest.raises(UserError, match=f"--host 127.0.0.1 --port {port}: cannot listen there"):
            app.listen("127.0.0.1", port)
    with pytest.raises(UserError, match="--port 70000"):
        app.listen("127.0.0.1", 70000)


def test_examples_are_the_same_every_time(tmp_path):
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
    first, second = (write_examples(tmp_path / name) for name in ("one", "other"))
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]


# In a browser.

CHROMIUM, DRIVER = (shutil.which(name) for name in ("chromium", "chromedriver"))


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[Server]:
    if importlib.util.find_spec("gradio") is None:
        pytest.skip("needs requirements-app.txt")
    server = Server(tmp_path_factory.mktemp("served"))
    yield server
    if server.process.poll() is None:
        server.stop()


@pytest.fixture(scope="module")
def page(server, tmp_path_factory) -> Iterator[Page]:
    webdriver = pytest.importorskip("selenium.webdriver")
    if not (CHROMIUM and DRIVER):
        pytest.skip("needs chromium and chromedriver")
    downloads = tmp_path_factory.mktemp("downloads")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    profile = tmp_path_factory.mktemp("profile")
    for argument in (
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--disable-background-networking",
        "--window-size=1280,1300",
        f"--user-data-dir={profile}",
    ):
        options.add_argument(argument)
    options.add_experimental_option("prefs", {"download.default_directory": str(downloads)})
    driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    yield Page(driver, server.url, downloads)
    driver.quit()


def test_an_upload_is_separated_and_downloaded(page, photograph):
    page.open()
    page.upload(photograph)
    page.uploaded()
    page.separate()
    before, after = page.separated()
    assert before.endswith(".jpg") and after.endswith("photograph-transmission.png")
    assert "60 × 40 pixels in " in page.text()
    assert page.find("#reflection img")[0].get_attribute("src").endswith("photograph-reflection.png")
    page.find("#download-transmission")[0].click()
    file = page.downloads / "photograph-transmission.png"
    page.until(file.is_file, "the download")
    assert np.array_equal(read_image(file), read_image(photograph)[:, ::-1])
    # Everything that was loaded came from here.
    loaded = page.driver.execute_script("return performance.getEntriesByType('resource').map(entry => entry.name)")
    assert loaded and all(address.startswith((page.url, "data:", "blob:")) for address in loaded)


def test_an_example_is_separated(page):
    page.open()
    page.until(lambda: page.find(".gallery-item"), "the examples")[0].click()
    page.uploaded()
    page.separate()
    assert page.separated()[1].endswith("example_1-transmission.png")


def test_what_is_wrong_is_told_on_the_page(page, bad):
    page.open()
    page.separate()
    page.until(lambda: "Drop a photograph first." in page.text(), "the error")
    for told, path in bad.items():
        page.open()
        page.upload(path)
        if told != "exceed the maximum allowed size of 1.0 Mb":  # is refused before it is sent
            page.uploaded()
            page.separate()
        page.until(lambda told=told: told in page.text(), told)


def test_another_checkpoint_and_one_that_is_damaged(page, photograph):
    from selenium.webdriver import Keys

    page.open()
    page.upload(photograph)
    page.uploaded()
    for name in ("second", "damaged"):
        field = page.find("input[aria-label=Checkpoint]")[0]
        field.click()
        choices = page.until(lambda: page.find("[role=option]"), "the choices")
        assert [choice.get_attribute("textContent").strip("✓ \n") for choice in choices] == [
            "first",
            "second",
            "damaged",
            "madsrnet_xs (bundled)",
        ]
        field.send_keys(Keys.CONTROL, "a")
        field.send_keys(name, Keys.ENTER)
        page.until(lambda field=field, name=name: field.get_attribute("value") == name, name)
        page.separate()
        page.separated()
    page.until(lambda: "damaged/best.pt: not a checkpoint" in page.text(), "the error")


def test_no_file_outlives_its_page(page, server, photograph):
    page.open()
    page.upload(photograph)
    page.uploaded()
    page.separate()
    page.separated()
    assert {"photograph.png", "photograph.jpg", "photograph-transmission.png"} <= server.files()
    page.driver.get("about:blank")
    page.until(lambda: not server.files(), "the end of " + ", ".join(server.files()))


def test_it_fetches_nothing_from_elsewhere(server):
    with pytest.raises(urllib.error.HTTPError, match="403"):
        urllib.request.urlopen(f"{server.url}/gradio_api/file=http://127.0.0.1:9/")
    with urllib.request.urlopen(f"{server.url}/config") as answer:
        events = json.load(answer)["dependencies"]
    (separate,) = [event["id"] for event in events if len(event["outputs"]) == 5]
    image = {"path": "https://example.org/photograph.png", "meta": {"_type": "gradio.FileData"}}
    request = {"data": [image, "first"], "fn_index": separate, "session_hash": "test"}
    headers = {"Content-Type": "application/json"}
    urllib.request.urlopen(
        urllib.request.Request(f"{server.url}/gradio_api/queue/join", json.dumps(request).encode(), headers)
    )
    with urllib.request.urlopen(f"{server.url}/gradio_api/queue/data?session_hash=test", timeout=30) as answer:
        assert b"Addresses are not fetched" in answer.read()
    with urllib.request.urlopen(server.url) as answer:
        assert answer.headers["Content-Security-Policy"].startswith("default-src 'self'")
        assert b'"analytics_enabled":false' in answer.read().replace(b" ", b"")


def test_sigterm_leaves_nothing(server):
    """The last one: it ends the server."""
    assert server.stop() == 128 + signal.SIGTERM
    assert not list(server.temporary.iterdir())
    assert not list((ROOT / "tools").glob("*.pyi"))  # Gradio writes one beside classes that are made of its own


# The continuous integration's browser.


@pytest.mark.parametrize("effect", ["true", "exit 100"])
def test_ci_gets_a_browser_or_goes_on_without(tmp_path, effect):
    for name in (".ci/run", "tools/environment.sh"):
        (tmp_path / name).parent.mkdir()
        shutil.copy(ROOT / name, tmp_path / name)
    executable(tmp_path / "tests/run.sh", '#!/bin/sh\necho "tests: $*"\n')
    for tool in ("bash", "sh", "dirname", "env"):
        (tmp_path / "bin").mkdir(exist_ok=True)
        (tmp_path / "bin" / tool).symlink_to(shutil.which(tool))
    executable(tmp_path / "bin/id", "#!/bin/sh\necho 0\n")
    executable(tmp_path / "bin/apt-get", f'#!/bin/sh\necho "$*" >>"{tmp_path}/log"\n{effect}\n')

    def run() -> str:
        done = subprocess.run(
            [tmp_path / ".ci/run", "-k", "x"], env={"PATH": f"{tmp_path}/bin"}, capture_output=True, text=True
        )
        assert done.returncode == 0 and done.stderr == ""
        return done.stdout

    assert run() == "Running ./tests/run.sh\ntests: -k x\n"
    log = (tmp_path / "log").read_text()
    assert "update" in log and ("chromium chromium-driver" in log) == (effect == "true")
    for name in ("chromium", "chromedriver"):
        executable(tmp_path / "bin" / name, "#!/bin/sh\n")
    run()
    assert (tmp_path / "log").read_text() == log  # asked for nothing more

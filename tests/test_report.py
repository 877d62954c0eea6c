"""The report: its figures and pictures are the run's, hostile texts do no harm, and in a browser it works."""

import base64
import csv
import hashlib
import html
import io
import json
import re
import shutil
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import markupsafe
import numpy as np
import pytest
import yaml
from PIL import Image

from dereflect.tools import report
from dereflect.tools.reports.page import TEMPLATES, data_uri
from dereflect.tools.reports.pictures import Shown
from dereflect.util import program
from dereflect.util.images import read_image
from dereflect.util.metrics import quality_assess
from dereflect.util.run.reader import read_metrics, read_run
from tests.helpers import COMMENT, embedded, make_page

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
NAME = "<img src=x onerror=alert(1)>"


@pytest.fixture(scope="module")
def finished(tiny_data, tmp_path_factory) -> Path:
    """A run of two tiny epochs with a comment that means harm; its data has names that do."""
    from tests.helpers import run

    data = tmp_path_factory.mktemp("data") / "data"
    shutil.copytree(tiny_data, data)
    for path in (data / "test/demo_clip").rglob("00.png"):
        path.rename(path.with_name(f"{NAME}.png"))
    more = (
        "--inet",
        "dsrnet_xs",
        "--nEpochs",
        "2",
        "--comment",
        COMMENT,
        "--save_images",
        "--name",
        "run",
        "--ema",
        "0.5",
    )
    status, folder = run(data, tmp_path_factory.mktemp("runs"), *more)
    assert status == 0
    return folder


@pytest.fixture(scope="module")
def page(finished, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("page") / "report.html"
    make_page(finished, path, "--pictures", "weights", "--checkpoint", str(finished / "last.pt"))
    return path


def recorded(folder: Path, epoch: int) -> dict[tuple[str, str], dict[str, float]]:
    with (folder / f"per_image/epoch_{epoch:03}.csv").open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["set"] != "val"]
    numbers = ("PSNR", "SSIM", "input_PSNR", "input_SSIM")
    return {(row["set"], row["name"]): {key: float(row[key]) for key in numbers} for row in rows}


def test_every_test_image_has_the_figures_of_its_evaluation(finished, page):
    images = embedded(page.read_text(), "data")["images"]
    rows = recorded(finished, 2)
    assert {(image["set"], image["name"]) for image in images} == set(rows) and len(images) == len(rows) == 8
    for image in images:
        row = rows[image["set"], image["name"]]
        # The same weights on the same machine; the record and the page round.
        assert image["PSNR"] == pytest.approx([row["input_PSNR"], row["PSNR"]], abs=2e-4)
        assert image["SSIM"] == pytest.approx([row["input_SSIM"], row["SSIM"]], abs=2e-4)
        assert (image["width"], image["height"]) == (52, 40)


def test_saved_pictures_are_those_of_the_last_evaluation(finished, page, tmp_path):
    computed = embedded(page.read_text(), "data")["images"]
    text = make_page(finished, tmp_path / "page.html", "--pictures", "saved")
    saved = embedded(text, "data")["images"]
    assert "images/, epoch 2" in text
    for a, b in zip(computed, saved, strict=True):
        assert a["name"] == b["name"] and b["kinds"] == ["transmission", "target", "reflection"]
        assert a["PSNR"] == pytest.approx(b["PSNR"], abs=0.05), "8 bits against none"


def test_auto_takes_saved_pictures_only_of_the_right_epoch(finished, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    best = read_run(folder).best_epoch("val")
    text = make_page(folder, tmp_path / "a.html")
    assert ("images/, epoch 2" if best == 2 else f"best.pt, epoch {best}") in text
    assert "last.pt, epoch 2" in make_page(folder, tmp_path / "b.html", "--checkpoint", str(folder / "last.pt"))
    for path in folder.glob("*.pt"):
        path.unlink()
    assert "images/, epoch 2" in make_page(folder, tmp_path / "c.html"), "without weights there are only the saved ones"


def test_tables_and_curves_are_the_records(finished, page):
    text = page.read_text()
    lines = [line for line in read_metrics(finished) if line["estimate"] == "model"]
    charts = {chart["title"]: chart for chart in embedded(text, "data")["charts"]}
    psnr = {series["name"]: series["points"] for series in charts["PSNR, dB"]["series"]}
    assert psnr == {
        name: [[line["epoch"], line["PSNR"]] for line in lines if line["set"] == name]
        for name in ("val", "demo_clip", "demo_screen", "average")
    }
    assert {series["name"] for series in charts["losses"]["series"]} >= {"total", "t_pixel", "vgg", "reconstruction"}
    assert [point[0] for point in charts["learning rate"]["series"][0]["points"]] == [2, 4, 6, 8]
    assert charts["gradient norm"]["series"][0]["points"][0][1] > 0
    picked = read_run(finished).picked[0]
    average = next(line for line in lines if line["set"] == "average" and line["epoch"] == picked)
    assert table_row(text, f"epoch {picked}, picked on the held-out pairs")[-1] == cell(average)
    untouched = [line for line in read_metrics(finished) if line["estimate"] == "input"]
    assert table_row(text, "untouched") == [cell(line) for line in untouched]
    for told in ("peak memory", "GiB", "torch"):
        assert told in text


def table_row(text: str, what: str) -> list[str]:
    """The cells of a row of the table of figures."""
    return re.findall("<td>(.*?)</td>", text.split(f'<th scope="row">{what}</th>')[1].split("</tr>")[0])


def cell(line: dict) -> str:
    return f"{line['PSNR']:.2f} <small>{line['SSIM']:.3f}</small>"


def test_the_figures_have_baselines_of_the_same_images(finished, page):
    folder = Path(yaml.safe_load((finished / "options.yaml").read_text())["base_dir"]) / "test"
    scores = defaultdict(list)
    for path in sorted(folder.glob("*/blended/*")):
        mixture, target = (read_image(path.parents[1] / of / path.name) for of in ("blended", "transmission_layer"))
        for change in ("gamma", "times"):
            darker = mixture**1.2 if change == "gamma" else 0.9 * mixture
            found = quality_assess(darker * 255, target * 255)
            for name in (path.parents[1].name, "average"):
                scores[change, name].append((found["PSNR"], found["SSIM"]))
    assert len(scores["gamma", "average"]) == 8
    for what, change in (("gamma 1.2", "gamma"), ("times 0.9", "times")):
        means = [np.mean(scores[change, name], 0) for name in ("demo_clip", "demo_screen", "average")]
        wanted = ["", *(cell({"PSNR": psnr, "SSIM": ssim}) for psnr, ssim in means)]  # "val" is not among the pictures
        assert [found.replace(" <small></small>", "") for found in table_row(page.read_text(), what)] == wanted
    assert "gamma 1.2</th>" not in page.read_text().split("<h2>Test images")[1]


def test_pictures_stand_before_curves_and_changed_options_before_the_others(page):
    text = page.read_text()
    places = [text.index(f"<h2>{title}</h2>") for title in ("Figures", "Test images", "Curves", "The run")]
    assert places == sorted(places)
    changed, others = text.split("Options that differ")[1].split("<details>")
    assert '<th scope="row">crop_size</th><td>32</td>' in changed and "crop_size" not in others
    assert '<th scope="row">wd</th>' in others and "<details open" not in text


def test_nothing_from_outside_becomes_html(page):
    text = page.read_text()
    assert markupsafe.escape(COMMENT) in text
    assert "<script>alert" not in text and "<img" not in text and "\u2028" not in re.findall("<script.*", text)[0]
    data = embedded(text, "data")
    assert NAME in {image["name"] for image in data["images"]}
    scripts = re.findall(r"<script\b([^>]*)>(.*?)</script\b", text, re.DOTALL)
    assert len(scripts) == 8 + 2 and [kind for kind, _ in scripts if "json" not in kind] == [""]
    policy = html.unescape(re.search('http-equiv="Content-Security-Policy" content="([^"]*)"', text)[1])
    assert "default-src 'none'" in policy and "unsafe" not in policy
    digest = hashlib.sha256(scripts[-1][1].encode()).digest()
    assert f"script-src 'sha256-{base64.b64encode(digest).decode()}'" in policy
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", text.split("<h3>Options")[0])


def test_json_in_a_script_element_ends_nowhere():
    hostile = {"</script>": ["<!--", "\u2028", "&amp;", "\ud800"]}
    text = TEMPLATES.from_string("{{ value | tojson }}").render(value=hostile)
    assert not set("<>&\u2028") & set(text) and json.loads(text) == hostile


def test_pictures_are_small_and_not_distorted():
    y, x = np.indices((300, 600))
    smooth = np.stack([x / 600, y / 300, 0 * x], -1).astype(np.float32) * 1.2 - 0.1
    uri = data_uri(smooth, 200)
    picture = Image.open(io.BytesIO(base64.b64decode(uri.removeprefix("data:image/webp;base64,"))))
    assert picture.size == (200, 100) and picture.format == "WEBP"
    wanted = Image.fromarray((smooth.clip(0, 1) * 255).astype(np.uint8)).resize((200, 100))
    assert np.abs(np.asarray(picture.convert("RGB"), float) - np.asarray(wanted, float)).mean() < 4


def test_pictures_keep_to_the_side_that_is_asked_for(finished, tmp_path):
    text = make_page(finished, tmp_path / "page.html", "--pictures", "saved", "--max_side", "26")
    sizes = {
        kind: Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))).size
        for kind, uri in embedded(text, "picture0").items()
    }
    assert sizes == {"input": (26, 20), "target": (26, 20), "transmission": (26, 20), "reflection": (13, 10)}


def test_a_damaged_run_still_has_a_page(finished, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder, ignore=shutil.ignore_patterns("*.pt", "events*", "images"))
    (folder / "metrics.jsonl").write_text('{"epoch": 1, "st')
    (folder / "events.out.tfevents.1").write_bytes(b"no events")
    text = make_page(folder, tmp_path / "page.html", "--pictures", "none")
    assert "Nothing has been evaluated" in text and "1 of 1 lines" in text
    assert embedded(text, "data") == {"charts": [], "images": []}


def test_without_pictures_torch_is_not_imported(finished, tmp_path):
    code = "from dereflect.tools import report\n"
    code += f"report.main([{str(finished)!r}, '-o', {str(tmp_path / 'page.html')!r}, "
    code += "'--pictures', 'none'])\nimport sys\nassert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1], check=True)


@pytest.mark.parametrize(
    ("break_it", "arguments", "told"),
    [
        (lambda run: shutil.rmtree(run), [], "not the folder of a run"),
        (lambda run: (run / "options.yaml").unlink(), [], "no options.yaml"),
        (lambda run: None, ["--base_dir", "nowhere"], "--base_dir nowhere"),
        (lambda run: None, ["--checkpoint", "nowhere.pt"], "nowhere.pt"),
        (lambda run: None, ["--pictures", "saved"], "--save_images"),
        (lambda run: [path.unlink() for path in run.glob("*.pt")], [], "--checkpoint"),
        (lambda run: None, ["--pictures", "none", "-o", "nowhere/x.html"], "-o nowhere"),
    ],
)
def test_what_cannot_work_is_one_line_and_leaves_nothing(break_it, arguments, told, finished, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder, ignore=shutil.ignore_patterns("images"))
    break_it(folder)
    assert program.run(report.main, [str(folder), "--gpu_ids", "-1", *arguments]) == 2
    said = capsys.readouterr().err
    assert told in said and said.count("\n") == 1
    assert not list(tmp_path.rglob("*.html*"))


def test_a_page_that_breaks_off_leaves_the_one_before(finished, tmp_path):
    from dereflect.tools.reports import page as writer

    def broken() -> Iterator[Shown]:
        raise KeyboardInterrupt
        yield

    path = tmp_path / "report.html"
    path.write_text("before")
    with pytest.raises(KeyboardInterrupt):
        writer.write(path, read_run(finished), [], broken(), "", 100)
    assert path.read_text() == "before" and list(tmp_path.iterdir()) == [path]


# ---- in a browser -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser(page, tmp_path_factory):
    """The page, opened from the disk."""
    webdriver = pytest.importorskip("selenium.webdriver")
    if not (CHROMIUM and DRIVER):
        pytest.skip("needs Chromium and its driver")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    flags = "headless no-sandbox disable-gpu no-first-run disable-background-networking disable-component-update"
    for flag in (*flags.split(), "disable-sync", "window-size=1300,1000"):
        options.add_argument(f"--{flag}")
    options.add_argument(f"--user-data-dir={tmp_path_factory.mktemp('chromium')}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture
def opened(browser, page):
    browser.get(page.as_uri())
    yield browser  # an alert would make the test's next command fail
    assert browser.get_log("browser") == []


def names(browser) -> list[str]:
    """Names of the cards, in their order."""
    script = "return [...document.querySelectorAll('.card h3')].map(h => h.firstChild.textContent)"
    return browser.execute_script(script)


def choose(browser, control: str, value: str) -> None:
    from selenium.webdriver.support.select import Select

    Select(browser.find_element("id", control)).select_by_value(value)


def test_the_slider_moves_the_border(opened):
    from selenium.webdriver import ActionChains, Keys

    stage = opened.find_element("css selector", ".stage")
    opened.execute_script("arguments[0].scrollIntoView({block: 'center'})", stage)
    slider, before = stage.find_element("css selector", "input"), stage.find_elements("css selector", "img")[1]
    assert before.value_of_css_property("clip-path") == "inset(0px 50% 0px 0px)"
    quarter = stage.size["width"] // 4
    ActionChains(opened).move_to_element(stage).click_and_hold().move_by_offset(quarter, 0).release().perform()
    right = float(re.fullmatch(r"inset\(0px ([\d.]+)% 0px 0px\)", before.value_of_css_property("clip-path"))[1])
    assert right == pytest.approx(25, abs=2)
    handle = stage.find_element("css selector", ".handle")
    assert handle.rect["x"] - stage.rect["x"] == pytest.approx(0.75 * stage.size["width"], abs=6)
    slider.send_keys(Keys.HOME)
    assert before.value_of_css_property("clip-path") == "inset(0px 100% 0px 0px)"


def test_buttons_change_the_picture(opened, page):
    text = page.read_text()
    images = embedded(text, "data")["images"]
    worst = min(range(len(images)), key=lambda i: images[i]["PSNR"][1] - images[i]["PSNR"][0])
    pictures = embedded(text, f"picture{worst}")
    card = opened.find_element("css selector", ".card")
    opened.execute_script("arguments[0].scrollIntoView()", card)
    after, before = card.find_elements("css selector", "img")
    assert after.get_attribute("src") == pictures["transmission"]
    buttons = card.find_elements("css selector", "button")
    assert [button.text for button in buttons] == ["transmission", "target", "reflection", "residue"]
    for button in buttons[::-1]:
        button.click()
        assert after.get_attribute("src") == pictures[button.text] and before.get_attribute("src") == pictures["input"]
        assert [b.get_attribute("aria-pressed") for b in buttons] == [str(b == button).lower() for b in buttons]
    script = "return Promise.all([...arguments[0].querySelectorAll('img')].map(i => i.decode())).then(() => true)"
    assert opened.execute_script(script, card), "the browser can read them"


def test_sorted_worst_first_and_as_asked_for(opened, page):
    images = embedded(page.read_text(), "data")["images"]

    def ordered(key) -> list[str]:
        return [image["name"] for image in sorted(images, key=key)]

    def gain(image) -> float:
        return image["PSNR"][1] - image["PSNR"][0]

    assert names(opened) == ordered(gain)
    orders = {"best": lambda i: -gain(i), "psnr": lambda i: i["PSNR"][1], "set": lambda i: (i["set"], i["name"])}
    for value, key in orders.items():
        choose(opened, "sort", value)
        assert names(opened) == ordered(key)
    choose(opened, "sort", "name")
    assert names(opened) == sorted(names(opened)) and NAME in names(opened)
    choose(opened, "filter", "demo_clip")
    assert len(names(opened)) == 4 and opened.find_element("id", "count").text == "4 images"
    assert {h.text for h in opened.find_elements("css selector", ".card small")} == {"demo_clip"}
    choose(opened, "filter", "")
    assert len(names(opened)) == 8


def test_on_a_phone_no_word_is_broken_and_nothing_sticks_out(opened):
    broken = """
        const words = [];
        for (const cell of document.querySelectorAll(".wide th, .wide td, .facts th, h2, button, nav a")) {
            const texts = document.createTreeWalker(cell, NodeFilter.SHOW_TEXT);
            for (let text; (text = texts.nextNode()); ) for (const {0: word, index} of text.data.matchAll(/\\S+/g)) {
                const range = document.createRange();
                range.setStart(text, index);
                range.setEnd(text, index + word.length);
                words.push([word, range.getClientRects().length]);
            }
        }
        return words.filter(word => word[1] > 1);"""
    size = {"width": 360, "height": 800, "deviceScaleFactor": 1, "mobile": True}
    opened.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    try:
        assert opened.execute_script("return innerWidth") == 360
        assert opened.execute_script(broken) == []
        assert opened.execute_script("return document.documentElement.scrollWidth") == 360
    finally:
        opened.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_of_many_images_the_first_are_shown_until_all_are_asked_for(browser, finished, tmp_path):
    from dereflect.tools.reports import page as writer

    scores = {kind: {"PSNR": 20.0, "SSIM": 0.5} for kind in ("model", "input")}
    layers = dict.fromkeys(("input", "transmission"), np.zeros((4, 4, 3)))
    path = tmp_path / "report.html"
    writer.write(path, read_run(finished), [], [Shown("some", f"{i:02}", layers, scores) for i in range(30)], "", 4)
    browser.get(path.as_uri())
    more = browser.find_element("id", "more")
    assert len(names(browser)) == 12 and more.text == "Show all 30"
    more.click()
    assert len(names(browser)) == 30 and not more.is_displayed()


def test_pointing_at_a_curve_tells_its_values(opened, finished):
    from selenium.webdriver import ActionChains

    chart = opened.find_element("css selector", ".chart")
    assert chart.find_element("css selector", "h3").text == "PSNR, dB by epoch"
    picture = chart.find_element("css selector", "svg")
    assert len(picture.find_elements("css selector", "path")) == 4
    opened.execute_script("arguments[0].scrollIntoView({block: 'center'})", picture)
    ActionChains(opened).move_to_element_with_offset(picture, picture.size["width"] // 3, 0).perform()
    told = chart.find_element("css selector", ".tip").text
    values = {line["set"]: line["PSNR"] for line in read_metrics(finished) if line["epoch"] == 2}
    assert told.splitlines()[0] == "epoch 2"
    assert {line.split()[0]: float(line.split()[1]) for line in told.splitlines()[1:]} == pytest.approx(
        values, rel=1e-4
    )


def test_what_the_browser_shows_of_hostile_texts_is_text(opened, finished):
    assert opened.find_element("css selector", "header p").text == " ".join(COMMENT.replace("\u2028", " ").split())
    assert opened.execute_script("return document.querySelectorAll('img').length") == 2 * 8
    assert opened.execute_script("return document.querySelectorAll('script:not([type])').length") == 1
    assert read_run(finished).comment == COMMENT
    loaded = opened.execute_script("return performance.getEntriesByType('resource').map(entry => entry.name)")
    assert all(name.startswith("data:") for name in loaded)

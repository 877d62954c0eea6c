"""The page of tools/app.py for tests: a network that mirrors, the program as a server, the page in a browser."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.helpers import ROOT
from tests.project import executable

# Makes this the module models.separator.
STAND_IN = """
import sys, types
import numpy as np
from util.errors import UserError

class Mirror:
    def bands(self, image, wanted, watch):
        array = image / np.float32(np.iinfo(image.dtype).max)
        parts = {"transmission": array[:, ::-1], "reflection": array - 0.5}
        yield 0, [parts[name] for name in wanted]

def load_separator(checkpoint, inet=None, vgg_weights=None, precision="auto", gpu_ids=None, tile=None, overlap=None,
                   self_ensemble=False, strength=1.0):
    loaded.append((checkpoint.parent.name, precision, tile))
    if "damaged" in str(checkpoint):
        raise UserError("damaged/best.pt: not a checkpoint")
    return Mirror()

loaded = []
sys.modules["models.separator"] = separator = types.ModuleType("models.separator")
separator.load_separator, separator.loaded = load_separator, loaded
"""


class Server:
    """The program, in a folder with some checkpoints."""

    def __init__(self, folder: Path):
        self.temporary = folder / "temporary"
        self.temporary.mkdir()
        for age, name in enumerate(("first", "second", "damaged")):
            path = folder / "checkpoints" / name / "best.pt"
            executable(path, "")
            os.utime(path, (1e9 - age, 1e9 - age))
        code = f"{STAND_IN}\nfrom tools import app\nsys.exit(app.run(app.main))"
        self.process = subprocess.Popen(
            [sys.executable, "-c", code, "--port", "0", "--max_megabytes", "1", "--max_megapixels", "1"],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(self.temporary)},
            stderr=subprocess.PIPE,
            text=True,
        )
        lines = []
        for line in self.process.stderr:
            lines.append(line)
            if line.startswith("Open "):
                self.url = line.split()[1]
                return
        raise AssertionError("".join(lines))

    def files(self) -> set[str]:
        """Names of all photographs that it has."""
        kinds = {".png", ".jpg"}
        names = {path.name for path in self.temporary.rglob("*") if path.suffix in kinds}
        return {name for name in names if not name.startswith("example_")}

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        status = self.process.wait(30)
        self.process.stderr.close()
        return status


class Page:
    """The page in a browser."""

    def __init__(self, driver, url: str, downloads: Path):
        self.driver = driver
        self.url = url
        self.downloads = downloads

    def open(self) -> None:
        self.driver.get(self.url)
        self.until(lambda: self.find("#photograph input[type=file]"), "the page")

    def find(self, selector: str) -> list:
        return self.driver.find_elements("css selector", selector)

    def text(self) -> str:
        return self.driver.find_element("css selector", "body").text

    def until(self, happened, what: str):
        """Wait, and return what `happened` returns when it is true."""
        from selenium.common.exceptions import StaleElementReferenceException

        end = time.monotonic() + 90
        while time.monotonic() < end:
            try:
                if result := happened():
                    return result
            except StaleElementReferenceException:
                pass
            time.sleep(0.1)
        raise AssertionError(f"{what} did not come; the page says: {self.text()}")

    def upload(self, path: Path) -> None:
        self.find("#photograph input[type=file]")[0].send_keys(str(path))

    def uploaded(self) -> None:
        self.until(lambda: self.find("#photograph img"), "the photograph")

    def separate(self) -> None:
        self.find("#separate")[0].click()

    def separated(self) -> list[str]:
        """The addresses of before and after."""
        return self.until(
            lambda: (
                [image.get_attribute("src") for image in self.find("#slider img")][:2]
                if "pixels in" in self.text()
                else None
            ),
            "the result",
        )

"""docs/scan.md: its blocks run, its model learns, and nothing of the networks is loaded for it."""

import re
import subprocess
import sys

import pytest

from tests.helpers import ROOT

PAGE = (ROOT / "docs/scan.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_the_blocks_of_the_page_run(number, tmp_path):
    ending = """
import sys
assert not [name for name in sys.modules if name.startswith(("torchvision", "cv2", "PIL", "dereflect.models.arch"))]
print(globals().get("right", 1.0))
"""
    code = f"import sys; sys.path.append({str(ROOT)!r})\n{BLOCKS[number]}{ending}"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.split()[-1]) > 0.995, done.stdout


def test_there_are_blocks():
    assert len(BLOCKS) == 2

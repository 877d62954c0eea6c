"""What the README says of the tree is so."""

import re
import subprocess

from tests.helpers import ROOT


def test_the_layout_names_every_file_and_only_these():
    text = (ROOT / "docs/layout.md").read_text(encoding="utf-8")
    named = re.findall(r"^([\w./-]+) {2,}\S", text.split("```")[1], re.MULTILINE)
    folders = tuple(name for name in named if name.endswith("/"))
    assert all((ROOT / name).exists() for name in named)
    done = subprocess.run(["git", "ls-files", "*.py", "*.sh"], cwd=ROOT, capture_output=True, text=True)
    parts = ("tools/benchmarks/", "tools/inspection/", "tools/page/", "tools/preparation/", "tools/reports/", *folders)
    missing = [
        name
        for name in done.stdout.split()
        if name not in named and not name.startswith(parts) and not name.endswith("__init__.py")
    ]
    assert not missing

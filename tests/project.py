"""A copy of the project's shell scripts, whose train_sirs.py just says how it was called."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from tests.helpers import ROOT

# Stands in for train_sirs.py and for torchrun. Prints how it was called as the last line of its output.
RECORDER = """
import json, os, sys
if "--list_models" in sys.argv:
    print("dsrnet_s\\ndsrnet_l\\nmdsrnet_l")
else:
    print(json.dumps({"program": __spec__ and __spec__.name, "arguments": sys.argv[1:], "pid": os.getpid(),
                      "folder": os.getcwd(), "environment": dict(os.environ)}))
"""

NVIDIA_SMI = """#!/bin/sh
[ "$*" = -L ] || exit 1
echo "GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-0a)"
echo "GPU 1: NVIDIA A100-SXM4-40GB (UUID: GPU-1b)"
echo "  MIG 1g.5gb     Device  0: (UUID: MIG-2c)"
echo "GPU 12: NVIDIA T4 (UUID: GPU-3d)"
"""


def executable(path: Path, text: str) -> None:
    """A new file, also where a link is: never what the link leads to, which may be a program of the system."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    path.write_text(text)
    path.chmod(0o755)


class Project:
    """A copy of the scripts in a folder of its own, with stand-ins around them."""

    def __init__(self, folder: Path):
        self.root = folder / "a project"  # the blank is meant
        self.bin = folder / "bin"
        (self.root / "tools").mkdir(parents=True)
        shutil.copy(ROOT / "runner.sh", self.root)
        shutil.copy(ROOT / "tools" / "environment.sh", self.root / "tools")
        (self.root / "requirements.txt").write_text("pytest\n")
        (self.root / "train_sirs.py").write_text(RECORDER)
        self.environment = {
            **os.environ,
            "PATH": os.pathsep.join(map(str, [self.bin, *self._folders_without_uv(folder / "of the system")])),
            "PYTHON": sys.executable,
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        self.nvidia_smi(NVIDIA_SMI)

    def _folders_without_uv(self, made: Path) -> list[Path]:
        """Those of PATH. A test that has uv brings its own."""
        folders = [Path(folder) for folder in os.environ["PATH"].split(os.pathsep)]
        for i, folder in enumerate(folders):
            if (folder / "uv").exists():
                folders[i] = made / str(i)
                folders[i].mkdir(parents=True)
                for file in folder.iterdir():
                    if file.name != "uv":
                        (folders[i] / file.name).symlink_to(file)
        return folders

    def nvidia_smi(self, text: str) -> None:
        executable(self.bin / "nvidia-smi", text)

    def only(self, *tools: str) -> None:
        """Leaves nothing in PATH but bash, dirname and these."""
        shutil.rmtree(self.bin)
        self.bin.mkdir()
        for tool in ("bash", "dirname", *tools):
            (self.bin / tool).symlink_to(shutil.which(tool))
        self.environment["PATH"] = str(self.bin)

    def apt_get(self, effect: str) -> None:
        """An apt-get for a root user: `install` has this effect."""
        executable(self.bin / "id", "#!/bin/sh\necho 0\n")
        log = self.root / "apt.log"
        executable(self.bin / "apt-get", f"""#!/bin/sh\necho "$*" >>"{log}"\n[ "$2" = update ] || {effect}\n""")

    def bash(self, *command: str, cwd: Path | None = None) -> subprocess.CompletedProcess:
        return subprocess.run(
            ["bash", *command],
            cwd=cwd or self.root,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
        )

    def run(self, *arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess:
        return self.bash(str(self.root / "runner.sh"), *arguments, cwd=cwd)

    def call(self, *arguments: str, cwd: Path | None = None) -> dict:
        """What the stand-in recorded of a call that must succeed."""
        done = self.run(*arguments, cwd=cwd)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    def refuse(self, *arguments: str) -> str:
        """The one line that a call is refused with before anything starts."""
        done = self.run(*arguments)
        assert done.returncode == 2
        assert done.stdout == ""
        *before, line = done.stderr.splitlines()
        assert line.startswith("runner.sh: ")
        assert all(text.startswith("Python: ") for text in before)
        return line

    def use_environment(self, requirements: str, *prelude: str) -> subprocess.CompletedProcess:
        """`use_environment` with these requirements; apt-get and pip must not be reached."""
        (self.root / "requirements.txt").write_text(requirements)
        script = [". tools/environment.sh", *prelude, "use_environment requirements.txt", 'echo "$PYTHON"']
        return self.bash("-euc", "\n".join(script))

    def lacking(self, requirements: str) -> str:
        """What the Python of the tests is said to lack."""
        (self.root / "requirements.txt").write_text(requirements)
        done = self.bash("-uc", '. tools/environment.sh; lacking "$PYTHON" "$ROOT/requirements.txt"')
        assert done.stderr == ""
        assert done.returncode == (1 if done.stdout else 0)
        return done.stdout.strip()

    def distribution(self, name: str, version: str) -> None:
        """Something installed, as far as metadata goes."""
        folder = self.root / "site" / f"{name}-{version}.dist-info"
        folder.mkdir(parents=True)
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        self.environment["PYTHONPATH"] = str(self.root / "site")

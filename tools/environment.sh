# shellcheck shell=bash
# Sourced by runner.sh and tests/run.sh: `use_environment FILE` sets PYTHON to an interpreter that has all that
# the requirements file FILE asks for, and makes one in .venv if there is none.
# Kept to what bash 3.2 understands, the one that macOS has.

ROOT=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
VENV=$ROOT/.venv

say() { printf '%s\n' "$*" >&2; }

# Runs a Python command in the project: Python imports from the current directory, which could hold anything, such as
# a fcntl.py. PYTHONSAFEPATH, since Python 3.11, keeps it from that in the project, too.
isolated() { (cd "$ROOT" && PYTHONSAFEPATH=1 "$@"); }

# Prints the full path of interpreter $1 if it runs and is new enough.
path_of_python() {
    "$1" -c 'import sys; sys.version_info < (3, 10) and sys.exit(1); print(sys.executable)' 2>/dev/null
}

# Prints the interpreter to start from: $PYTHON if set, else the first of the usual names that will do. An
# active virtual environment comes first in PATH, so it is what `python3` means.
find_python() {
    if [ -n "${PYTHON:-}" ]; then
        path_of_python "$PYTHON"
        return
    fi
    local name
    for name in python3 python3.13 python3.12 python3.11 python3.10; do
        path_of_python "$name" && return
    done
    return 1
}

# Prints what interpreter $1 lacks of requirements file $2, and fails if it lacks anything.
lacking() {
    [ -x "$1" ] && isolated "$1" - "$2" <<'PYTHON'
import re
import sys
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def first(*names):
    """The first of these modules that is there; they are alike. Pip has copies of its own."""
    for name in names:
        try:
            return import_module(name)
        except ImportError:
            pass
    print("pip")
    sys.exit(1)


Requirement = first("packaging.requirements", "pip._vendor.packaging.requirements").Requirement
Version = first("packaging.version", "pip._vendor.packaging.version").Version
tomllib = first("tomllib", "tomli", "pip._vendor.tomli")


def project(folder, extras):
    """What pyproject.toml asks for: always, and for these extras."""
    told = tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for line in [*told["dependencies"], *(line for extra in extras for line in told["optional-dependencies"][extra])]:
        requirement = Requirement(line)
        if requirement.name == told["name"]:
            yield from project(folder, requirement.extras)
        else:
            yield requirement


def requirements(path):
    for line in path.read_text(encoding="utf-8").splitlines():
        line = re.sub(r"(^|\s)#.*", "", line).strip()
        include = re.match(r"(?:-r|--requirement)[\s=]*(.+)", line)
        this = re.match(r"-e\s*\.(?:\[(.+)\])?$", line)
        if include:
            yield from requirements(path.parent / include[1])
        elif this:
            yield from project(path.parent, (this[1] or "").replace(" ", "").split(",") if this[1] else [])
        elif line and not line.startswith("-"):
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate():
                yield requirement


def lack(requirement):
    try:
        found = Version(version(requirement.name))
    except PackageNotFoundError:
        return str(requirement)
    except (KeyError, TypeError, ValueError):  # no version: its installation was interrupted
        return f"{requirement} (half-installed)"
    # The base version too, because NVIDIA's containers call their 2.11 something like 2.11.0a0+nv26.
    if requirement.specifier.contains(found, prereleases=True) or requirement.specifier.contains(found.base_version):
        return None
    return f"{requirement} (it has {found})"


lacks = [text for text in map(lack, requirements(Path(sys.argv[1]))) if text]
if lacks:
    print(", ".join(lacks[:3]) + (f" and {len(lacks) - 3} more" if len(lacks) > 3 else ""))
    sys.exit(1)
PYTHON
}

# Installs Debian packages, if this is a system and a user that can.
apt_install() {
    [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null || return 1
    say "Installing $* with apt-get"
    DEBIAN_FRONTEND=noninteractive
    export DEBIAN_FRONTEND
    apt-get -qq update && apt-get -qq install -y --no-install-recommends "$@" >/dev/null
}

# Makes an empty .venv with interpreter $1, by uv where that is there.
make_venv() {
    local make=("$1" -m venv)
    if command -v uv >/dev/null; then
        make=(uv venv --quiet --seed --python "$1")
    # Debian keeps ensurepip, without which a virtual environment has no pip, in a package of its own.
    elif ! isolated "$1" -c 'import ensurepip' 2>/dev/null; then
        local package
        package=$(isolated "$1" -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])')
        if ! apt_install "$package"; then
            say "$1 cannot make virtual environments; do: sudo apt-get install $package"
            return 1
        fi
    fi
    rm -rf "$VENV"
    isolated "${make[@]}" "$VENV" || {
        say "$1 could not make $VENV (see above)"
        return 1
    }
}

# Installs requirements file $1 into .venv, by uv where that is there. With CPU_ONLY set, on Linux, torch comes from
# PyTorch's index of builds without CUDA where that answers, and everything else from the usual one.
install() {
    local index=https://download.pytorch.org/whl/cpu size="6 GB" pip=pip torch='' quiet=''
    [ "$(uname -s)" = Linux ] || size="2 GB"
    if [ -n "${CPU_ONLY:-}" ] && [ "$(uname -s)" = Linux ] && answers "$index/torch/"; then
        size="1.5 GB"
        torch=$(sed -n 's/^ *"\(torch[a-z]*[<>=][^"]*\)".*/\1/p' "$ROOT/pyproject.toml")
    fi
    command -v uv >/dev/null && pip=uv
    say "Installing ${1##*/} into .venv with $pip: about $size on the disk in all, some minutes"
    [ -t 1 ] || quiet=--quiet
    # shellcheck disable=SC2086 # a word for each requirement
    [ -z "$torch" ] || "install_with_$pip" ${quiet:+"$quiet"} --index-url "$index" $torch || return
    "install_with_$pip" ${quiet:+"$quiet"} -r "$1"
}

install_with_pip() { isolated "$VENV/bin/python" -m pip install --no-input --disable-pip-version-check "$@"; }

install_with_uv() { isolated uv pip install --python "$VENV/bin/python" "$@"; }

# Whether an address answers within some seconds.
answers() {
    isolated "$VENV/bin/python" - "$1" <<'PYTHON' 2>/dev/null
import sys
import urllib.request

urllib.request.urlopen(sys.argv[1], timeout=5).close()
PYTHON
}

# Brings .venv to what requirements file $2 asks for, with interpreter $1 if it must be made. To be called with
# file descriptor 9 open on a file, which is locked meanwhile.
complete_venv() {
    # The lock belongs to the open file, which this shell and its children share. So it outlives the Python
    # that takes it, and the system drops it when the last of them ends, however it ends.
    isolated "$1" - <<'PYTHON'
import fcntl
import sys

try:
    fcntl.flock(9, fcntl.LOCK_EX | fcntl.LOCK_NB)
except BlockingIOError:
    print("Another process is setting up .venv; waiting for it", file=sys.stderr, flush=True)
    fcntl.flock(9, fcntl.LOCK_EX)
except OSError as error:
    print(f"Going on without a lock ({error}): start no second set-up meanwhile", file=sys.stderr)
PYTHON
    lacking "$VENV/bin/python" "$2" >/dev/null && return # the other process has done it all

    # One that was interrupted early has no pip; one that another tool made may have none either.
    if ! path_of_python "$VENV/bin/python" >/dev/null || {
        ! isolated "$VENV/bin/python" -m pip --version >/dev/null 2>&1 &&
            ! isolated "$VENV/bin/python" -m ensurepip >/dev/null 2>&1
    }; then
        make_venv "$1" || return
    fi

    install "$2" || {
        say "Could not install ${2##*/} into .venv (see above): check the network and the space on the disk," \
            "then start this again; if that is not it, remove .venv first"
        return 1
    }
}

# Sets PYTHON to an interpreter that has all that requirements file $1 (in the project's folder) asks for, and
# says which and why. Fails, after saying why, if there is none and none can be made.
use_environment() {
    local file=$ROOT/$1 python why
    if python=$(find_python); then
        if why=$(lacking "$python" "$file"); then
            PYTHON=$python
            say "Python: $PYTHON, which has all of $1"
            return
        fi
        why="$python lacks $why"
    elif [ -n "${PYTHON:-}" ]; then
        say "PYTHON=$PYTHON is not a Python of version 3.10 or newer"
        return 1
    else
        why="no other Python of version 3.10 or newer was found"
    fi

    if lacking "$VENV/bin/python" "$file" >/dev/null; then
        why=
    else
        if [ -z "$python" ]; then
            command -v python3 >/dev/null || apt_install python3 python3-venv
            python=$(find_python) || {
                say "Python 3.10 or newer is needed and was not found. Install one (Debian, Ubuntu:" \
                    "sudo apt-get install python3 python3-venv; macOS: brew install python)" \
                    "or name one: PYTHON=/path/to/python3"
                return 1
            }
        fi
        # This very file is the one to lock: it is there already and nothing is left over.
        (complete_venv "$python" "$file") 9>>"$ROOT/tools/environment.sh" || return 1
    fi
    PYTHON=$VENV/bin/python
    say "Python: .venv/bin/python${why:+, because $why}"
}

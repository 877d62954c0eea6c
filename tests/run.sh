#!/usr/bin/env bash
# Lint, format, shell scripts, tests. Arguments go to pytest: ./tests/run.sh -k scan; ./tests/run.sh -m slow runs
# those that it leaves out otherwise.
set -uo pipefail

case ${1:-} in
-h | --help)
    cat <<'HELP'
usage: ./tests/run.sh [arguments of pytest]

Lints (ruff, shellcheck), then runs the tests, as the continuous integration does. The first start looks for a Python
with all of requirements-dev.txt and otherwise installs that into .venv.

examples:
  ./tests/run.sh                      everything but the slow tests
  ./tests/run.sh -k scan              the tests with scan in their names
  ./tests/run.sh tests/faults         a folder, or a file
  ./tests/run.sh -m slow              the slow tests
HELP
    exit
    ;;
esac
# shellcheck source=tools/environment.sh
. "$(dirname -- "${BASH_SOURCE[0]}")/../tools/environment.sh"
cd "$ROOT" || exit
use_environment requirements-dev.txt || exit 1
PATH=$(dirname -- "$PYTHON"):$PATH # where pip has put shellcheck

summary='' failed=0

# Runs command $2... as step $1, whether or not the ones before it failed.
step() {
    local name=$1
    shift
    printf '\n== %s\n' "$name"
    if "$@"; then
        summary="$summary$name: passed"$'\n'
    else
        summary="$summary$name: FAILED"$'\n'
        failed=1
    fi
}

step "ruff check" "$PYTHON" -m ruff check .
step "ruff format" "$PYTHON" -m ruff format --check .
if command -v shellcheck >/dev/null; then
    step "shellcheck" shellcheck -x ./*.sh tests/*.sh tools/*.sh .ci/run
else
    summary="${summary}shellcheck: skipped, it is not installed"$'\n'
fi
# A process for every core, each file's tests in one of them: tiny networks gain nothing from more threads.
export OMP_NUM_THREADS=1
step "pytest" "$PYTHON" -m pytest --numprocesses auto --dist loadfile "$@"

printf '\n%s' "$summary"
exit "$failed"

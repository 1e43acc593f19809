#!/usr/bin/env bash
# Set up an environment if need be, then run something in it:
#   ./run.sh demo              the paper's job on the embedded data set, a few minutes on a CPU
#   ./run.sh test [ARGS]       the tests (ARGS go to pytest)
#   ./run.sh SCRIPT [ARGS]     any script, e.g. ./run.sh train_corruption --help
# The interpreter is .venv's if there is one, else the current one if it has torch and torchvision,
# else that of a new .venv. PYTHON names another one to start from.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

usage() { sed -n '2,7s/^# \{0,1\}//p' "$here/run.sh"; }
if [ $# -eq 0 ]; then usage >&2; exit 2; fi
command=$1; shift
case $command in -h|--help|help) usage; exit 0;; esac

python=${PYTHON:-}
if [ -z "$python" ] && [ -x "$here/.venv/bin/python" ]; then
    python=$here/.venv/bin/python
else
    for candidate in python3 python3.13 python3.12 python3.11 python3.10; do
        [ -n "$python" ] && break
        if command -v "$candidate" >/dev/null && "$candidate" -c \
            'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null
        then python=$candidate; fi
    done
    if [ -z "$python" ]; then
        echo "error: Python 3.10 to 3.13 is needed (or name one: PYTHON=…)" >&2; exit 2
    fi
    if ! "$python" -c 'import torch, torchvision' 2>/dev/null; then
        echo "making $here/.venv"
        "$python" -m venv "$here/.venv"
        python=$here/.venv/bin/python
    fi
fi

# Installs what a requirements file names, once: nothing happens when all of it is there.
require() {
    if ! "$python" - "$here/$1" <<'PY' 2>/dev/null
import re, sys
from importlib.metadata import version
def check(path):
    for line in open(path):
        line = line.strip()
        if line.startswith("-r "):
            check(path.rsplit("/", 1)[0] + "/" + line[3:])
        elif line:
            name, least = re.fullmatch(r"([\w-]+)>=([\d.]+)", line).groups()
            numbers = lambda v: [int(n) for n in re.findall(r"\d+", v)[:2]]
            assert numbers(version(name)) >= numbers(least)
check(sys.argv[1])
PY
    then
        echo "installing $1"
        "$python" -m pip install --quiet --disable-pip-version-check -r "$here/$1"
    fi
}

case $command in
    demo)
        require requirements.txt
        cd "$here"
        exec "$python" reproduce.py demo "$@" ;;
    test)
        require requirements-dev.txt
        cd "$here"
        exec "$python" -m pytest "$@" ;;
    *)
        script=$here/${command%.py}.py
        if [ ! -f "$script" ]; then echo "error: no script $command here" >&2; usage >&2; exit 2; fi
        require requirements.txt
        exec "$python" "$script" "$@" ;;
esac

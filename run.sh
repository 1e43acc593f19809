#!/usr/bin/env bash
# Set up an environment if need be, then run something in it:
#   ./run.sh demo              the paper's job on the embedded data set, a few minutes on a CPU
#   ./run.sh test [ARGS]       the tests, a process for each core (ARGS go to pytest)
#   ./run.sh test --oldest     the tests with exactly the least versions stated, in .venv-oldest
#   ./run.sh SCRIPT [ARGS]     any script, e.g. ./run.sh train_corruption --help
# The interpreter is .venv's if there is one, else the current one if it has torch and torchvision,
# else that of a new .venv. PYTHON names another one to start from.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

usage() { sed -n '2,8s/^# \{0,1\}//p' "$here/run.sh"; }
if [ $# -eq 0 ]; then usage >&2; exit 2; fi
command=$1; shift
case $command in -h|--help|help) usage; exit 0;; esac

python=${PYTHON:-}
if [ "$command ${1:-}" = "test --oldest" ]; then
    : # an environment of its own
elif [ -z "$python" ] && [ -x "$here/.venv/bin/python" ]; then
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

# Installs what a requirements file names; nothing happens when all of it is there.
# A virtual environment of uv has no pip.
require() {
    "$python" -c 'import pip' 2>/dev/null || "$python" -m ensurepip >/dev/null
    "$python" -m pip install --quiet --disable-pip-version-check -r "$here/$1"
}

case $command in
    demo)
        echo "demo: patching on the embedded data set; checking the packages"
        require requirements.txt
        cd "$here"
        exec "$python" reproduce.py demo "$@" ;;
    test)
        if [ "${1:-}" = --oldest ]; then
            shift
            python=$here/.venv-oldest/bin/python
            [ -x "$python" ] || "${PYTHON:-python3.10}" -m venv "$here/.venv-oldest"
            cat "$here"/requirements*.txt | sed '/^-r/d; s/>=/==/' >"$here/.venv-oldest/exact.txt"
            require .venv-oldest/exact.txt
        else
            require requirements-dev.txt
        fi
        cd "$here"
        # A thread for each of the processes: more would wait for each other.
        OMP_NUM_THREADS=1 exec "$python" -m pytest -n auto --dist loadfile "$@" ;;
    *)
        script=$here/${command%.py}.py
        if [ ! -f "$script" ]; then echo "error: no script $command here" >&2; usage >&2; exit 2; fi
        require requirements.txt
        exec "$python" "$script" "$@" ;;
esac

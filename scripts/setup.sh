#!/usr/bin/env bash
# Makes .venv with everything that the demo and the tests need. PYTHON names another interpreter.
set -euo pipefail
cd "$(dirname "$0")/.."
new_enough='import sys; sys.exit(sys.version_info < (3, 11))'

if ! .venv/bin/python -c "$new_enough; import pip" 2>/dev/null; then
    for python in ${PYTHON:-python3 python3.13 python3.12 python3.11}; do
        if "$python" -c "$new_enough" 2>/dev/null; then found=$python; break; fi
    done
    if [ -z "${found:-}" ]; then
        version=$("${PYTHON:-python3}" --version 2>/dev/null || echo missing)
        echo "Python 3.11 or newer is needed; '${PYTHON:-python3}' is $version." >&2
        echo "Install one, or name one: make PYTHON=python3.11 demo" >&2
        exit 1
    fi
    echo "making .venv with $("$found" --version)"
    "$found" -m venv --clear .venv
    echo "installing torch and friends, about 2 minutes"
else
    echo "bringing .venv up to date with pyproject.toml"
fi
.venv/bin/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'

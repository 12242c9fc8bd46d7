#!/bin/sh
# Print the first Python that can make a virtual environment, trying the versions given in that order.
# Usage: find_python.sh 3.11 3.12 ...
#
# Each candidate is run, because a name on PATH may be a pyenv shim for a version that is not selected, or a
# distribution's Python without ensurepip. The file that it says it runs is what is printed.

try() { # NAME VERSION
    "$1" -c "
import sys
import ensurepip, venv
sys.version_info[:2] == tuple(map(int, '$2'.split('.'))) or sys.exit(1)
print(sys.executable)" 2>/dev/null
}

for version in "$@"; do
    for name in "python$version" python3 "${PYENV_ROOT:-$HOME/.pyenv}/versions/$version".*/bin/python; do
        try "$name" "$version" && exit 0
    done
done
echo "error: no Python $(echo "$*" | sed 's/ /, /g') with the venv module was found; install one (Debian: apt-get install python3-venv) or name it: make PYTHON=/path/to/python" >&2
exit 1

#!/bin/sh
# Installs @COMMAND@ from this folder into a virtual environment of its own. No root, no network.
#   sh install.sh [FOLDER]        PYTHON=/path/to/python3 picks an interpreter
set -eu

stop() { echo "$*" >&2; exit 1; }

here=$(cd "$(dirname "$0")" && pwd)
target=${1:-$HOME/$(basename "$here")}
python=${PYTHON:-python@PYTHON@}

cd "$here"
sha256sum --quiet --check SHA256SUMS || stop "A file of the bundle is damaged. Unpack it anew, or ask for another copy."
command -v "$python" >/dev/null || stop "There is no $python here. Install Python @PYTHON@, or name it: PYTHON=/path/to/python3"
"$python" -c 'import sys; sys.exit("%d.%d" % sys.version_info[:2] != "@PYTHON@")' ||
    stop "This bundle is for Python @PYTHON@, and $python is another version. Name it: PYTHON=/path/to/python@PYTHON@"
[ ! -e "$target" ] || stop "$target exists. Name another folder: sh install.sh FOLDER"

# A half-made environment is taken away again, so that a second try starts afresh.
trap 'rm -rf "$target"' EXIT
trap 'exit 1' INT TERM
echo "Installing @COMMAND@ into $target (a minute or two) ..."
"$python" -m venv "$target" || stop "No virtual environment could be made. On Debian and Ubuntu: apt install python@PYTHON@-venv"
# No configuration of pip on this machine has a say.
PIP_CONFIG_FILE=/dev/null "$target/bin/python" -I -m pip --isolated --disable-pip-version-check install --quiet \
    --no-index --find-links wheels --require-hashes --only-binary :all: -r requirements.txt
"$target/bin/@COMMAND@" --help >/dev/null
trap - EXIT

echo "Installed: $target/bin/@COMMAND@"

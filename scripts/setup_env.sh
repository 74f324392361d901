#!/bin/bash
# Make the development environment: scripts/setup_env.sh PYTHON VENV
#
# Creates VENV with PYTHON unless it is there and works, then installs requirements-dev.txt and
# mtckpt itself (editable). Safe to run again: what is installed already is left as it is.
# TORCH_PIP_ARGS: more arguments for the one command that installs torch, such as the index of
# torch's CPU builds where the default index would bring the CUDA one.
set -euo pipefail

python=$1
venv=$2
cd "$(dirname "$0")/.."

say() { printf '== %s\n' "$*"; }
die() { printf 'error: %s\n' "$*" >&2; exit 1; }

command -v "$python" > /dev/null \
    || die "no '$python' here; install Python 3.11 or later, or say which: make PYTHON=python3.12 ..."
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || die \
    "'$python' is $("$python" -V 2>&1); the pinned tools need 3.11 or later: make PYTHON=python3.12 ..."

install_venv_module() {
    # Debian ships venv without ensurepip; the missing half is a package of its own.
    local version
    version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
    if [ "$(id -u)" = 0 ] && command -v apt-get > /dev/null; then
        say "installing python3-venv (this Python has no ensurepip)"
        timeout 300 apt-get -qq update || true
        DEBIAN_FRONTEND=noninteractive timeout 300 apt-get -qq install -y python3-venv > /dev/null \
            || DEBIAN_FRONTEND=noninteractive timeout 300 \
                apt-get -qq install -y "python$version-venv" > /dev/null \
            || die "apt-get could not install python3-venv; install it, then run make again"
    else
        die "this Python has no ensurepip; as root: apt-get install python3-venv, then make again"
    fi
}

if ! "$venv/bin/python" -m pip --version > /dev/null 2>&1; then
    "$python" -c 'import ensurepip, venv' 2> /dev/null || install_venv_module
    say "creating $venv with $("$python" -V 2>&1)"
    "$python" -m venv --clear "$venv"
fi

pip() { "$venv/bin/python" -m pip --disable-pip-version-check "$@"; }
torch=$(grep -E '^torch==' requirements-dev.txt)

# torch on its own and first: installed together with the rest, or after it, another package's
# wider range could choose the build. After this, its pin in the same file keeps it as it is.
if [ "$("$venv/bin/python" -c \
    'from importlib.metadata import version; print("torch==" + version("torch").split("+")[0])' \
    2> /dev/null)" != "$torch" ]; then
    say "installing $torch"
    # shellcheck disable=SC2086  # the variable holds several arguments
    pip install --quiet --progress-bar off ${TORCH_PIP_ARGS:-} "$torch"
fi

say "installing requirements-dev.txt"
pip install --quiet --progress-bar off --requirement requirements-dev.txt

say "installing mtckpt (editable)"
pip install --quiet --no-deps --no-build-isolation --editable .

#!/bin/bash
# Install the system tools that some tests use, where that is possible; never fail.
#
# Without a tool, the tests that need it are skipped and say so. MTCKPT_NO_APT=1 leaves the
# system alone.
set -uo pipefail

say() { printf '== %s\n' "$*"; }

# command or library : the package that has it
wanted="
strace:strace
fusermount3:fuse3
libfuse.so.2:libfuse2
ip:iproute2
iptables:iptables
mkfs.ext4:e2fsprogs
unshare:util-linux
setpriv:util-linux
losetup:mount
"

present() {
    case $1 in
        *.so.*) PATH=$PATH:/sbin:/usr/sbin ldconfig -p 2> /dev/null | grep -q -F "$1" ;;
        *) PATH=$PATH:/sbin:/usr/sbin command -v "$1" > /dev/null ;;
    esac
}

missing=()
for entry in $wanted; do
    present "${entry%%:*}" || missing+=("${entry##*:}")
done
[ ${#missing[@]} -gt 0 ] || exit 0

if [ "${MTCKPT_NO_APT:-0}" != 0 ] || [ "$(id -u)" != 0 ] || ! command -v apt-get > /dev/null; then
    say "not here, their tests will be skipped: ${missing[*]}"
    exit 0
fi

say "installing for the tests: ${missing[*]}"
export DEBIAN_FRONTEND=noninteractive
apt() { timeout 120 apt-get -qq -o DPkg::Lock::Timeout=60 "$@" > /dev/null 2>&1 < /dev/null; }
apt update
for package in "${missing[@]}"; do
    # One by one: a package that this release does not have must not take the others along.
    # Newer releases call the library libfuse2t64.
    apt install -y --no-install-recommends "$package" \
        || apt install -y --no-install-recommends "${package}t64" \
        || say "could not install $package; its tests will be skipped"
done
exit 0

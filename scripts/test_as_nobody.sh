#!/bin/bash
# Run the tests as a user without any rights, in a copy of the tree that is this user's own.
#
#     scripts/test_as_nobody.sh [ARGUMENTS OF PYTEST]
#
# Root starts it, since only root may become somebody else. The default is what `make test` runs.
# Files that git does not know yet and does not ignore are in the copy too.
set -euo pipefail

cd "$(dirname "$0")/.."
user=${MTCKPT_TEST_UID:-65534}
[ "$(id -u)" = 0 ] || { echo "only root may become user $user" >&2; exit 2; }

place=$(mktemp -d /tmp/mtckpt-nobody.XXXXXX)
trap 'rm -rf "$place"' EXIT
mkdir "$place/tree" "$place/home" "$place/tmp"
git ls-files -z --cached --others --exclude-standard | while IFS= read -r -d '' file; do
    [ -e "$file" ] && printf '%s\0' "$file"
done | tar -c --null -T - | tar -x -C "$place/tree"
chown -R "$user:$user" "$place"

as_nobody=(
    setpriv "--reuid=$user" "--regid=$user" --clear-groups
    env "HOME=$place/home" "TMPDIR=$place/tmp" PYTHONDONTWRITEBYTECODE=1
)
ours=${PYTHON:-.venv/bin/python}
packages=$("$ours" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
version=$("$ours" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
# The interpreter of .venv may lie in root's home: another one of its version takes its packages.
for base in "$(readlink -f "$ours")" "/usr/bin/python$version"; do
    rm -rf "$place/venv"
    "${as_nobody[@]}" "$base" -m venv --without-pip "$place/venv" 2> /dev/null || continue
    printf '%s\n' "$place/tree" "$packages" > "$place/venv/lib/python$version/site-packages/borrowed.pth"
    python=$place/venv/bin/python
    cd "$place/tree"
    "${as_nobody[@]}" "$python" -c 'import pytest, numpy' 2> /dev/null || { cd "$OLDPWD"; continue; }
    status=0
    "${as_nobody[@]}" "$python" -m pytest -p no:cacheprovider -m "not torture and not gpu" "$@" \
        || status=$?
    exit "$status"
done
echo "user $user can run no Python $version with the packages in $packages" >&2
exit 3

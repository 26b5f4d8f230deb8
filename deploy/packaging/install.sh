#!/bin/sh
# Installs fedveil below PREFIX, from a source tree: what the Dockerfile runs, and what a bare machine runs.
#
#   sh deploy/packaging/install.sh cpu|cuda [PREFIX]
#
# EXTRAS        parts to install                  (client,sql; a coordinator needs only: server)
# WHEELHOUSE    a folder made by 'make wheelhouse': nothing is asked of any network then
# TORCH_INDEX   where torch comes from; PyPI's own wheel is the one with CUDA
set -eu

variant=${1:?cpu or cuda}
prefix=${2:-/opt/fedveil}
extras=${EXTRAS:-client,sql}
tree=$(cd "$(dirname "$0")/../.." && pwd)

case $variant in
cpu) index=${TORCH_INDEX:-https://download.pytorch.org/whl/cpu} ;;
cuda) index=${TORCH_INDEX:-https://pypi.org/simple} ;;
*)
    echo "install.sh: the variant is cpu or cuda, not '$variant'" >&2
    exit 2
    ;;
esac

python3.11 -m venv "$prefix"
pip="$prefix/bin/pip --disable-pip-version-check --no-cache-dir"
if [ -n "${WHEELHOUSE:-}" ]; then
    (cd "$WHEELHOUSE" && sha256sum --quiet -c SHA256SUMS)
    $pip install -q --no-index --find-links "$WHEELHOUSE" "fedveil[$extras]"
else
    # torch alone and first, so that the second command, which asks PyPI for everything else, finds it there
    $pip install -q --no-deps --index-url "$index" -c "$tree/constraints.txt" torch
    $pip install -q -c "$tree/constraints.txt" "$tree[$extras]"
fi
install -m 755 "$tree/deploy/packaging/serve.sh" "$prefix/bin/fedveil-serve"
"$prefix/bin/fedveil" --help >/dev/null

#!/usr/bin/env bash
# Run all checks that need a GPU, in under 8 minutes; see benchmarks/device_check.py.
#
#     bash benchmarks/device_check.sh OUT [--from STEP] [--tiny]
#
# Needs Python 3.12 with jax 0.11.2 and CUDA (set PYTHON to use an interpreter other than python3).
# Nothing is installed or downloaded. Other packages come from a folder of wheels made by
# benchmarks/device_bundle.sh: WHEELS, by default "wheels" beside the tree or inside it.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-python3}
wheels=${WHEELS:-}
for folder in "$root/wheels" "$root/../wheels"; do
    [ -z "$wheels" ] && [ -d "$folder" ] && wheels=$(cd "$folder" && pwd)
done
[ $# -gt 0 ] || set -- --help
# The steps run in another folder: make a relative OUT absolute.
case $1 in -* | /*) ;; *) set -- "$PWD/$1" "${@:2}" ;; esac

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir "$work/tree" "$work/site"
# Lay the tree out as installed: the folder models becomes the package mquant_jax.models.
cp -R "$root/mquant_jax" "$root/benchmarks" "$root/tests" "$root/pyproject.toml" "$work/tree"
cp -R "$root/models" "$work/tree/mquant_jax/models"
if [ -n "$wheels" ]; then
    for wheel in "$wheels"/*.whl; do
        [ -e "$wheel" ] && "$python" -m zipfile -e "$wheel" "$work/site"
    done
fi
cd "$work/tree"
export PYTHONPATH="$work/tree:$work/site${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
export XLA_PYTHON_CLIENT_PREALLOCATE=false
"$python" -m benchmarks.device_check "$@"

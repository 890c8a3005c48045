#!/usr/bin/env bash
# Pack what benchmarks/device_check.sh needs on a GPU machine without a network.
#
#     bash benchmarks/device_bundle.sh DIR            the part of the tree it needs, and all wheels
#     bash benchmarks/device_bundle.sh DIR NAME...    only these packages' wheels, for machines
#                                                     that have the tree and the other packages
#
# DIR gets tree/ (first form only) and wheels/. More than 64 MiB in total is an error. Then run:
#
#     bash DIR/tree/benchmarks/device_check.sh OUT                        (first form)
#     WHEELS=DIR/wheels bash benchmarks/device_check.sh OUT               (second form)
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
limit=$((64 * 1024 * 1024))
[ $# -gt 0 ] || { sed -n '2,12s/^# \{0,1\}//p' "$0"; exit 2; }
[ ! -e "$1" ] || { echo "error: $1 exists; choose another folder" >&2; exit 2; }
mkdir -p "$1/wheels"
out=$(cd "$1" && pwd)
shift

names=$(grep -v '^#' "$root/benchmarks/device_wheels.txt")
if [ $# -gt 0 ]; then
    chosen=
    for name in "$@"; do
        chosen+=" $(grep -i "^$name==" <<<"$names")" ||
            { echo "error: $name is not in benchmarks/device_wheels.txt" >&2; exit 2; }
    done
    names=$chosen
fi
platforms=()
for n in 28 27 17; do platforms+=(--platform "manylinux_2_${n}_x86_64"); done
# shellcheck disable=SC2086
"${PYTHON:-python3}" -m pip download -q --no-deps --only-binary=:all: --python-version 3.12 \
    --implementation cp "${platforms[@]}" --platform manylinux2014_x86_64 -d "$out/wheels" $names

size() { find "$@" -type f -print0 | xargs -0 stat -c %s | awk '{ n += $1 } END { print n + 0 }'; }
if [ $# -gt 0 ]; then
    tree=$(cd "$root" && git ls-files -z | xargs -0 stat -c %s | awk '{ n += $1 } END { print n }')
else
    mkdir "$out/tree"
    # Leave out the demo model's weights, the data of other tests, and stored results.
    (cd "$root" && git ls-files -z pyproject.toml mquant_jax models benchmarks tests/conftest.py \
        tests/helpers.py tests/mquant_jax/test_ops_gpu.py tests/mquant_jax/test_ops_rotate.py \
        tests/goldens/qwen2_vl/public ':!:*/demo/heldout.npz' ':!:*/demo/model/model.safetensors' \
        ':!:benchmarks/results' | xargs -0 cp --parents -t "$out/tree")
    tree=$(size "$out/tree")
fi
wheels=$(size "$out/wheels")
echo "tree $((tree >> 10)) KiB, wheels $((wheels >> 10)) KiB, together $(((tree + wheels) >> 10))" \
    "of $((limit >> 10)) KiB"
[ $((tree + wheels)) -le $limit ] || { echo "error: more than 64 MiB" >&2; exit 1; }

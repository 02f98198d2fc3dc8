#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Measure everything on a GPU host. The same command goes on where the last one stopped.
#
#   bash run.sh                        beside the pieces of a bundle (make gpu-bundle)
#   BUNDLE= bash benchmarks/offline/run.sh in a checkout, with vllm and vllm-d2f[gpu] installed
#
#   PYTHON  interpreter that has torch for CUDA       python3
#   OUT     results                                   ./gpu-results
#   WORK    what stays: bundle, caches, checkpoints   ./gpu-work
#   BUNDLE  folder of the pieces, empty for none      the folder of this file if they are there
# Arguments go to benchmarks.offline.run: --minutes 6, --rehearse, --copy-to FOLDER, steps.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
python=${PYTHON:-python3}
out=$(realpath -m "${OUT:-gpu-results}")
work=$(realpath -m "${WORK:-gpu-work}")
if [ -z "${BUNDLE+set}" ]; then
    BUNDLE=; [ ! -f "$here/SHA256SUMS" ] || BUNDLE=$here
fi
mkdir -p "$out" "$work"
if [ -n "$BUNDLE" ]; then
    base=$work/bundle/$(sha256sum <"$BUNDLE/SHA256SUMS" | cut -c 1-12)
    if [ ! -d "$base" ]; then
        (cd "$BUNDLE" && sha256sum --check --quiet SHA256SUMS) || {
            echo "error: a piece of the bundle is missing or damaged: copy it again" >&2
            exit 1
        }
        rm -rf "$base.part"
        mkdir -p "$base.part"
        cat "$BUNDLE"/bundle.tar.xz.* | "$python" -c 'import sys, tarfile
with tarfile.open(fileobj=sys.stdin.buffer, mode="r|xz") as archive:
    archive.extractall(sys.argv[1], filter="data")' "$base.part"
        mv "$base.part" "$base"
    fi
    root=$base/repo
    # The bundle's packages come before the host's.
    export PYTHONPATH="$root:$base/site${PYTHONPATH:+:$PYTHONPATH}"
else
    root=$(cd "$here/../.." && pwd)
    "$python" -c 'import vllm, vllm_d2f' || {
        echo "vllm and vllm-d2f must be installed when there is no bundle: make setup EXTRA=gpu," >&2
        echo "then PYTHON=.venv/bin/python BUNDLE= bash benchmarks/offline/run.sh" >&2
        exit 2
    }
fi
[ -n "${CUDA_HOME:-}" ] || [ ! -d /usr/local/cuda ] || export CUDA_HOME=/usr/local/cuda
export HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1 VLLM_USE_FLASHINFER_SAMPLER=0
export VLLM_LOGGING_LEVEL=${VLLM_LOGGING_LEVEL:-WARNING} TOKENIZERS_PARALLELISM=false
# Compiled code is kept for the next call.
export VLLM_CACHE_ROOT="$work/vllm" TRITON_CACHE_DIR="$work/triton"
export FLASHINFER_WORKSPACE_BASE="$work/flashinfer" TORCHINDUCTOR_CACHE_DIR="$work/inductor"
cd "$root"
exec "$python" -m benchmarks.offline.run --out "$out" "$@"

#!/usr/bin/env bash
# The tests, and mtpbatch beside llama-server, on a Linux machine with an NVIDIA GPU:
#
#     benchmarks/gpu.sh [WORK_DIRECTORY]
#
# It needs the NVIDIA driver, the CUDA toolkit with nvcc, a C++ compiler, Python 3.11 or newer with
# venv, the package index, 12 GB of memory, 8 GB on the GPU, and 20 GB of disk. Everything is kept
# in the work directory, ~/.cache/mtpbatch-gpu, so that a second run compiles nothing again. The
# report is left in build/side-by-side-gpu.md and .json.
set -euo pipefail
cd "$(dirname "$0")/.."
work=$(realpath --canonicalize-missing "${1:-$HOME/.cache/mtpbatch-gpu}")

step() { printf '\n=== %s\n' "$1"; }
need() {
    command -v "$1" >/dev/null || {
        echo "$1 is not in PATH: $2" >&2
        exit 1
    }
}
need nvidia-smi "install the NVIDIA driver"
need nvcc "install the CUDA toolkit, and add its bin directory (/usr/local/cuda/bin) to PATH"
need c++ "install a C++ compiler"
need python3 "install Python"
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader

step "llama-cpp-python with CUDA"
# A cache of our own: pip's usual one may hold this version compiled for the CPU. The variables
# apply to llama-server as well, which benchmarks.side_by_side compiles.
export PIP_CACHE_DIR="$work/pip"
export CMAKE_ARGS="-DGGML_CUDA=on"
export CMAKE_BUILD_PARALLEL_LEVEL="${CMAKE_BUILD_PARALLEL_LEVEL:-$(nproc)}"
[ -d "$work/venv" ] || python3 -m venv "$work/venv"
# shellcheck disable=SC1091
. "$work/venv/bin/activate"
pinned=$(grep --only-matching --max-count=1 'llama-cpp-python==[0-9.]*' pyproject.toml)
pip install "$pinned" --no-binary llama-cpp-python
python -c 'import llama_cpp, sys; sys.exit(not llama_cpp.llama_supports_gpu_offload())' || {
    echo "llama-cpp-python was built without a GPU backend: delete $work and try again" >&2
    exit 1
}

step "mtpbatch and its tests"
pip install cmake '.[test,cli]'
tests=passed
pytest || tests=failed # the figures are of use all the same

step "A model of 3.5 B parameters with a vocabulary of 248,320 (3.7 GB)"
model="$work/wide-gpu.gguf"
[ -f "$model" ] || {
    python tools/widen_model.py "$model.part" --width 3072 --ff 8192 --layers 24 --vocab 248320
    mv "$model.part" "$model"
}

step "Side by side"
# On all sides llama.cpp's default applies: every layer is on the GPU.
python -m benchmarks.side_by_side "$model" \
    --concurrency 1 8 32 64 --build-dir "$work/bench" --output build/side-by-side-gpu

step "Tests $tests"
[ "$tests" = passed ]

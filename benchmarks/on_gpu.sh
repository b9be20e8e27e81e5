#!/usr/bin/env bash
# On a machine with a CUDA device, nvcc and a torch that has CUDA: build, test, time, write JSON.
#   benchmarks/on_gpu.sh [build] [test] [bench]     no argument: all three, under ten minutes
# PYTHON: the interpreter (default python3). OUT: where the JSON goes; default: the device's folder
# under benchmarks/results.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHON=${PYTHON:-python3}

build() {
  "$PYTHON" -c 'import torch; assert torch.cuda.is_available(), "torch sees no CUDA device"'
  FPI_CUDA_BUILD=cuda "$PYTHON" -m pip install --quiet --no-build-isolation --no-deps --editable .
  "$PYTHON" -c 'import fpi_cuda; i = fpi_cuda.build_info(); print(i); assert i["cuda_loaded"], i'
}

tests() {
  "$PYTHON" -m pytest -q --require-backend native:cpu --require-backend reference:cuda
}

bench() {
  local folder
  folder=${OUT:-benchmarks/results/$("$PYTHON" -c \
    'from benchmarks.measure import slug; print(slug("cuda"))')}
  "$PYTHON" -m benchmarks full --device cuda --budget 1 --json "$folder/full.json"
}

for stage in "${@:-all}"; do
  start=$SECONDS
  echo "== $stage"
  case $stage in
    all) build && tests && bench ;;
    build) build ;;
    test) tests ;;
    bench) bench ;;
    *) echo "on_gpu.sh: unknown stage $stage; there are build, test and bench" >&2; exit 2 ;;
  esac
  echo "== $stage: $((SECONDS - start)) s"
done

#!/usr/bin/env bash
# On a machine with a CUDA device, nvcc and a torch that has CUDA: build, test, check the kernels'
# memory accesses, time, write JSON.
#   benchmarks/on_gpu.sh [build] [test] [sanitize] [bench]    no argument: all, under ten minutes
#   DATA=DIR benchmarks/on_gpu.sh tasks                    the experiments
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
  "$PYTHON" -m pytest -q --require-backend native:cpu --require-backend native:cuda \
    --require-backend triton:cuda
}

# Slow, so the kernels alone and for two minutes each; where the tool is not found, a line says so.
# Triton's convolutions pass hidden layers through global memory of a program's own.
sanitize() {
  local tool
  tool=$(command -v compute-sanitizer || ls /usr/local/cuda*/bin/compute-sanitizer 2> /dev/null | tail -1 || true)
  if [ -z "$tool" ]; then
    echo "sanitize: skipped, compute-sanitizer was not found"
    return
  fi
  sanitized memcheck cuda tests/test_primitives.py tests/test_dense.py
  sanitized racecheck cuda tests/test_primitives.py tests/test_dense.py
  sanitized memcheck "size or channel" tests/triton_kernels/test_conv_kernels.py
}

# A check of the tool over those tests of some files that a keyword selects.
sanitized() {
  local check=$1 keyword=$2 status=0
  shift 2
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout 120 "$tool" --tool "$check" --error-exitcode 9 \
    "$PYTHON" -m pytest -q "$@" -k "$keyword" || status=$?
  case $status in
    0) echo "sanitize: $check of $* found nothing" ;;
    5) echo "sanitize: no test of $* was selected" ;;
    124) echo "sanitize: $check of $* ran out of time; above is what it saw until then" ;;
    *) return "$status" ;;
  esac
}

bench() {
  local folder wrong=0
  folder=${OUT:-benchmarks/results/$("$PYTHON" -c \
    'from benchmarks.machine import slug; print(slug("cuda"))')}
  timed "$folder/kernels.json" kernels loop memory failing import --sizes 256x128 4096x512 64x8192
  timed "$folder/solve.json" solve training --kinds easy hard --sizes 256x128 4096x512 64x8192
  timed "$folder/conv.json" solve training --kinds conv --sizes 64x16384
  timed "$folder/nets.json" denoise dense scaling
  timed "$folder/peers.json" peers --sizes 256x128
  "$PYTHON" -m benchmarks.plot "$folder"/*.json
  return $wrong
}

# The paper's experiments; DATA: the folder of data sets, from the repository's root. Not among all.
# Resumable: what is done is not done again. TASKS: some of them. PAIRS: of optical flow; the paper's count by default.
tasks() {
  local task out=runs/cuda size pairs
  for task in ${TASKS:-denoise flow bibtex}; do
    set -- --data "${DATA:?names the folder of data sets}" --device cuda --out "$out"
    case $task in
      bibtex) set -- "$@" --amp ;;
      denoise) set -- "$@" --seeds 0 1 2 ;;
      flow)
        size="width=1 columns=512 rows=384" pairs=${PAIRS:-22232}
        # shellcheck disable=SC2086 # words
        "$PYTHON" -m benchmarks.tasks flow time "$@" --set $size pairs=64 test_pairs=8
        # The training would make them too, with one process.
        "$PYTHON" -m benchmarks.tasks.flow.chairs "$out/flow/pairs-512x384-$pairs-640" \
          --train "$pairs" --test 640 --size 512 384 --data "$DATA" --workers "$(nproc)"
        # shellcheck disable=SC2086
        set -- "$@" --seeds 0 --set $size pairs="$pairs" test_pairs=640
        ;;
    esac
    "$PYTHON" -m benchmarks.tasks "$task" train "$@"
    "$PYTHON" -m benchmarks.tasks "$task" study "$@"
    [ "$task" = bibtex ] || "$PYTHON" -m benchmarks.tasks "$task" time "$@"
    "$PYTHON" -m benchmarks.tasks "$task" report --device cuda --out "$out"
  done
}

# What is wrong in one file does not keep the others from being made.
timed() {
  local file=$1
  shift
  "$PYTHON" -m benchmarks "$@" --device cuda --budget 0.5 --json "$file" || wrong=1
}

for stage in "${@:-all}"; do
  start=$SECONDS
  echo "== $stage"
  case $stage in
    all) build && tests && sanitize && bench ;;
    build) build ;;
    test) tests ;;
    sanitize) sanitize ;;
    bench) bench ;;
    tasks) tasks ;;
    *) echo "on_gpu.sh: unknown stage $stage; there are build, test, sanitize, bench, tasks" >&2; exit 2 ;;
  esac
  echo "== $stage: $((SECONDS - start)) s"
done

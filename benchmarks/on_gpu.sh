#!/usr/bin/env bash
# On a machine with a CUDA device and a torch that has CUDA, many small parts, one after another: each
# is a process with a timeout of its own, none keeps the next from running, and all end before BUDGET.
#
#   benchmarks/on_gpu.sh first      what tells most, in under nine minutes: facts, libraries, smoke
#                                   parts, CUDA tests, short timings, memory checks
#   benchmarks/on_gpu.sh bench      what is left then: convolutions, training, peers, scaling
#   benchmarks/on_gpu.sh build tests sanitize      of first, some alone
#   DATA=DIR benchmarks/on_gpu.sh experiments            the experiments; no timeout
#
# In OUT (default: the device's folder under benchmarks/results), brought up to date after each part:
# summary (a line a part: name, exit code or why it was skipped, seconds, the end of what it said),
# logs.tar.gz (all that they said), and JSON of timings. The exit code: how many parts failed.
#
# PYTHON: the interpreter (default python3). BUDGET: seconds in all (520); LONGEST: of a part. SLOW: a
# factor for all these, on a slow machine. SMOKE, TIMED: some of the smoke parts, of the timings.
# REHEARSE=1: with the CPU in the device's place, as small as can be; what only a device can do is
# skipped.
# `make gpu-carry` makes what a machine without network or nvcc lacks.
# No `set -e`: what goes wrong is written down, and the rest goes on.
case $OUT in '' | /*) ;; *) OUT=$PWD/$OUT ;; esac
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit
PYTHON=${PYTHON:-python3}
SLOW=${SLOW:-1}
BUDGET=$((${BUDGET:-520} * SLOW))
LONGEST=$((${LONGEST:-600} * SLOW))
AT_ONCE=4  # smoke parts
EACH=0.2
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}

MODULE=("$PYTHON" -m) TINY=()
if [ -n "$REHEARSE" ]; then
  MODULE=("$PYTHON" -m benchmarks.stand_in) TINY=(--tiny)
fi

# --- parts ------------------------------------------------------------------------------------

WORK=$(mktemp -d) || exit
mkdir "$WORK/logs" "$WORK/results"
declare -A RUNNING  # process → its part's name, start, seconds it has and seconds it should have
FAILED=0
SKIPPED=0
BLOCKED='' # why no part can run any more
BUILT=''   # whether stage build has run

# launch NAME SECONDS COMMAND...: starts a part, in less time where less is left, down to half.
# @INSIDE@ in the command: the seconds by which it has to end itself.
launch() {
  local name=$1 wanted=$(($2 * SLOW)) left=$((BUDGET - SECONDS - 6)) limit
  shift 2
  ((wanted < LONGEST)) || wanted=$LONGEST
  if [ -n "$BLOCKED" ]; then
    skip "$name" "$BLOCKED"
  elif ((2 * left < wanted)); then
    skip "$name" "it may take $wanted s, and of BUDGET = $BUDGET s too little is left"
  else
    limit=$((wanted < left ? wanted : left))
    timeout -k 5 "$limit" "${@//@INSIDE@/$((limit * 9 / 10))}" \
      > "$WORK/logs/$name.log" 2>&1 < /dev/null &
    RUNNING[$!]="$name $SECONDS $limit $wanted"
  fi
}

# Waits for one part of those that run.
reap() {
  local process code name start limit wanted said seconds
  # Not `wait -n`: bash 5.2 forgets a process that ended before it was called.
  while :; do
    for process in "${!RUNNING[@]}"; do
      ((${#RUNNING[@]} == 1)) && break 2
      kill -0 "$process" 2> /dev/null || break 2
    done
    sleep 0.1
  done
  wait "$process" 2> /dev/null  # bash would tell there who was killed
  code=$?
  read -r name start limit wanted <<< "${RUNNING[$process]}"
  unset "RUNNING[$process]"
  seconds=$((SECONDS - start))
  shorten "$WORK/logs/$name.log"
  said=$(grep -am 1 '^FAIL ' "$WORK/logs/$name.log") ||
    said=$(tail -c 4000 "$WORK/logs/$name.log" | tr '\r' '\n' | grep -a '[^[:space:]]' | tail -n 1)
  case $code in 124 | 137) ((seconds < limit)) || said="ended after its $limit s; $said" ;; esac
  ((limit == wanted)) || said="(given $limit s of $wanted) $said"
  ended "$name" "$code" "$seconds" "${said:0:200}"
  CODE=$code
}

ended() {
  (($2 == 0)) || FAILED=$((FAILED + 1))
  report "$(printf '%-24s %4d %4d s  %s' "$@")"
}

drain() {
  while ((${#RUNNING[@]})); do reap; done
}

# part NAME SECONDS COMMAND...: one part alone; CODE: its exit code, or nothing where it was skipped.
part() {
  CODE=''
  launch "$@"
  drain
}

skip() {
  SKIPPED=$((SKIPPED + 1))
  report "$(printf '%-24s skipped      %s' "$1" "$2")"
}

# What only a device can do.
on_device() {
  if [ -n "$REHEARSE" ]; then skip "$1" "only a device can do it"; CODE=''; else part "$@"; fi
}

report() {
  echo "$1" | tee -a "$WORK/summary"
  publish
}

# A log that would not fit keeps its two ends.
shorten() {
  (($(stat -c %s "$1") > 4000000)) || return
  { head -c 1000000 "$1"; printf '\n[... cut ...]\n'; tail -c 2000000 "$1"; } > "$1.cut" && mv "$1.cut" "$1"
}

# Everything so far into OUT; at no moment is there half a file.
publish() {
  local file
  [ -n "$OUT" ] || return
  tar -C "$WORK" -czf "$WORK/logs.tar.gz" logs 2> /dev/null  # a log may grow meanwhile
  for file in "$WORK"/summary "$WORK"/logs.tar.gz "$WORK"/results/*.json; do
    [ ! -e "$file" ] || { cp "$file" "$OUT/.new" && mv "$OUT/.new" "$OUT/${file##*/}"; } 2> "$WORK/why" || {
      rm -f "$OUT/.new"
      unusable_out "$(< "$WORK/why")"
      return
    }
  done
}

unusable_out() {
  echo "on_gpu.sh: nothing can be written to OUT=$OUT (${1:-no reason given}): name a folder with room" \
    "in OUT; until then all stays in $WORK" >&2
  OUT=
}

# shellcheck disable=SC2329 # by trap
stop() {
  trap '' INT TERM
  [ ${#RUNNING[@]} = 0 ] || kill "${!RUNNING[@]}"
  drain
  report "stopped by a signal after $SECONDS s"
  exit 130
}

# --- stages -----------------------------------------------------------------------------------

first() {
  smoke_names
  build
  smoke
  tests
  timings
  sanitize
}

# What is here; the libraries carried along, else built here. Where there is no device that can be
# used, all parts that follow are skipped with that reason.
build() {
  [ -z "$BUILT" ] || return
  BUILT=1
  on_device nvidia-smi 20 sh -c 'nvidia-smi && nvidia-smi --format=csv,noheader \
    --query-gpu=name,driver_version,memory.total,clocks.sm,clocks.mem,temperature.gpu,power.draw'
  part device 60 "${MODULE[@]}" benchmarks.on_gpu device
  [ "$CODE" != 3 ] || BLOCKED=$(tail -n 1 "$WORK/logs/device.log")
  part facts 60 "${MODULE[@]}" benchmarks.on_gpu facts "${TINY[@]}"
  on_device libraries-carried 60 "$PYTHON" -m benchmarks.on_gpu carried
  if [ "$CODE" = 0 ]; then
    skip libraries-built "the carried ones do"
  else
    on_device libraries-built 240 "$PYTHON" -m benchmarks.on_gpu build
  fi
}

# Each against float64, in a process of its own: an error of CUDA spoils the process it is in.
smoke() {
  local name seconds
  smoke_names
  for name in $SMOKE; do
    ((${#RUNNING[@]} < AT_ONCE)) || reap
    [ "$name" = compiled ] && seconds=90 || seconds=30  # inductor takes its time
    launch "smoke-$name" "$seconds" "${MODULE[@]}" benchmarks.smoke "$name" --device cuda
  done
  drain
}

# Asked first of all, so that each is named whatever happens.
smoke_names() {
  [ -z "$SMOKE" ] || return
  part smoke-list 60 "$PYTHON" -m benchmarks.smoke --list
  SMOKE=$(grep -aoE '^[a-z][a-z0-9_-]*( |$)' "$WORK/logs/smoke-list.log")
}

# The CUDA tests, many at a time; a test's own 60 s and an end before the part's where the plugins are
# installed.
tests() {
  pytests tests 150 6 -k cuda tests/test_primitives.py tests/test_dense_*.py tests/test_drivers.py \
    tests/test_graph_refusals.py tests/test_while_graph.py
  pytests tests-triton 75 12 tests/triton_kernels
}

PYTEST=(pytest -p no:cacheprovider -W default --tb=short --continue-on-collection-errors)

# pytests NAME SECONDS PROCESSES ARGUMENT...
pytests() {
  local name=$1 limit=$2 processes=$3 options=(-v --durations=10)
  shift 3
  has xdist && options+=(-n "$processes")
  has pytest_timeout && options+=(--timeout $((60 * SLOW)) --session-timeout @INSIDE@)
  [ -z "$REHEARSE" ] || options=(--collect-only -q)
  part "$name" "$limit" "${MODULE[@]}" "${PYTEST[@]}" "${options[@]}" \
    --junitxml "$WORK/logs/$name.xml" "$@"
}

has() {
  "$PYTHON" -c "import $1" > /dev/null 2>&1
}

# Nothing else runs meanwhile.
timings() {
  timed kernels 40 kernels
  timed loop 30 loop
  timed whole 80 whole
  timed convolutions 60 convolutions
}

bench() {
  EACH=0.5
  build
  timed convolutions 90 convolutions
  timed solve 120 solve training --kinds easy hard --sizes 256x128 4096x512 64x8192
  timed nets 120 scaling dense memory failing import denoise
  timed conv 60 solve training --kinds conv --sizes 64x16384
  timed peers 90 peers --sizes 256x128
}

# timed NAME SECONDS ARGUMENT...: rows in NAME.json; EACH: seconds of timed calls of one variant.
timed() {
  local name=$1 limit=$2
  shift 2
  if [[ -n $TIMED && " $TIMED " != *" $name "* ]]; then
    skip "time-$name" "TIMED names others"
    return
  fi
  # In a rehearsal sizes, which stand last, are the suites' tiny ones.
  [ -z "$REHEARSE" ] || while [[ " $* " == *" --sizes "* ]]; do set -- "${@:1:$#-1}"; done
  part "time-$name" "$limit" "${MODULE[@]}" benchmarks "$@" --device cuda --budget "$EACH" \
    "${TINY[@]}" --json "$WORK/results/$name.json"
}

# Of each kind of kernel one test: the tools slow a program down ten times and more.
sanitize() {
  local step="anderson_step and 1.0-5-cuda and float32" dense="solves_every_dtype"
  local files=(tests/test_primitives.py tests/test_dense_solves.py tests/test_drivers.py)
  sanitized memcheck 45 "${files[@]}" -k "$step and (1028 or 8193 or 40001) \
or $dense and picard and (float32 or bfloat16) or cuda_graph_gives and picard"
  sanitized racecheck 40 "${files[@]}" -k "$step and 8193 or $dense and anderson and two and bfloat16"
  with_tool ncu 40 ncu --clock-control none --kernel-name run --launch-count 6 --set detailed \
    "$PYTHON" -m "${PYTEST[@]}" -q tests/test_dense_solves.py -k "$dense and picard and bfloat16"
}

sanitized() {
  local check=$1 limit=$2
  shift 2
  export PYTORCH_NO_CUDA_MEMORY_CACHING=1  # else a tensor's end is not the end of its memory
  with_tool "$check" "$limit" compute-sanitizer --tool "$check" --error-exitcode 9 \
    "$PYTHON" -m "${PYTEST[@]}" -q "$@"
  unset PYTORCH_NO_CUDA_MEMORY_CACHING
}

# with_tool NAME SECONDS TOOL ARGUMENT...: a part where the tool is found. In a rehearsal: does the
# pytest that it would run select any test?
with_tool() {
  local name=$1 limit=$2 tool
  shift 2
  tool=$(PATH=$PATH:/usr/local/cuda/bin command -v "$1")
  if [ -n "$REHEARSE" ]; then
    while [ "$1" != pytest ]; do shift; done
    part "$name" "$limit" "${MODULE[@]}" "$@" --collect-only
  elif [ -z "$tool$BLOCKED" ]; then
    skip "$name" "$1 was not found in PATH or /usr/local/cuda/bin"
  else
    part "$name" "$limit" "$tool" "${@:2}"
  fi
}

# The experiments; DATA: the folder of data sets, from the repository's root. Resumable: what is done
# is not done again. TASKS: some of them. PAIRS: of optical flow; the paper's count by default.
experiments() {
  local task out=runs/cuda size pairs
  for task in ${TASKS:-denoise flow bibtex}; do
    set -- --data "${DATA:?names the folder of data sets}" --device cuda --out "$out"
    case $task in
      bibtex) set -- "$@" --amp ;;
      denoise) set -- "$@" --seeds 0 1 2 ;;
      flow)
        size="width=1 columns=512 rows=384" pairs=${PAIRS:-22232}
        # shellcheck disable=SC2086 # words
        "$PYTHON" -m experiments flow time "$@" --set $size pairs=64 test_pairs=8
        # The training would make them too, with one process.
        "$PYTHON" -m experiments.flow.chairs "$out/flow/pairs-512x384-$pairs-640" \
          --train "$pairs" --test 640 --size 512 384 --data "$DATA" --workers "$(nproc)"
        # shellcheck disable=SC2086
        set -- "$@" --seeds 0 --set $size pairs="$pairs" test_pairs=640
        ;;
    esac
    "$PYTHON" -m experiments "$task" train "$@"
    "$PYTHON" -m experiments "$task" study "$@"
    [ "$task" = bibtex ] || "$PYTHON" -m experiments "$task" time "$@"
    "$PYTHON" -m experiments "$task" report --device cuda --out "$out"
  done
}

# --- the run ----------------------------------------------------------------------------------

stage() {
  case $1 in
    first) first ;;
    build) build ;;
    smoke) smoke ;;
    tests) tests ;;
    timings) timings ;;
    sanitize) sanitize ;;
    bench) bench ;;
    experiments | tasks) # the stage had that name
      (set -euo pipefail; experiments)
      ended experiments $? "$SECONDS" ""
      ;;
  esac
}

STAGES="first build smoke tests timings sanitize bench experiments tasks"
for name in "${@:-none}"; do
  if [[ " $STAGES " != *" $name "* ]]; then
    echo "on_gpu.sh: each argument must be one of: $STAGES (got ${*:-none})" >&2
    exit 2
  fi
done

# Carried packages that are not installed here.
while read -r folder; do PYTHONPATH+=:$folder; done < <("$PYTHON" -m benchmarks.on_gpu packages)

if [ -z "$OUT" ]; then
  OUT=$("$PYTHON" -m benchmarks.on_gpu folder 2> /dev/null) || OUT=build/on_gpu
  echo "OUT is not set: results go to $OUT"
fi
mkdir -p "$OUT" 2> "$WORK/why" || unusable_out "$(< "$WORK/why")"
publish  # says at once where nothing can be written
trap stop INT TERM
trap '[ -z "$OUT" ] || rm -rf "$WORK"' EXIT

for name in "$@"; do stage "$name"; done
report "$FAILED failed, $SKIPPED skipped, $SECONDS s"
exit $((FAILED < 100 ? FAILED : 100))

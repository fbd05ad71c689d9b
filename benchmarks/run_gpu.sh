#!/usr/bin/env bash
# GPU tests and benchmarks on a CUDA machine, in under ten minutes and without a network.
#
#   OUT=results bash benchmarks/run_gpu.sh [--peers DIR]     # needs Python 3.10+, torch 2.11+, triton 3.6+, pytest
#   OUT=results bash benchmarks/run_gpu.sh --dry-run         # the same steps at tiny sizes, on the CPU
#
# Results go to the folder OUT (default: gpu_results): summary.txt with the end of every step, logs.txt with all of it,
# a JSON file per benchmark, kernels.png. All are written as soon as there is something to write: what was reached
# before a run is cut off is kept. Each step has processes and a time of its own, so that a kernel that fails or hangs
# costs its own step alone. What is worth most comes first: whether results are right at the model's shapes, how fast
# that is, and then everything else; a step that needs less than its share of the time leaves it to those after it.
# Wheels that lie in wheels/ are used in place of what is installed. The exit code is 0 if all tests passed.
set -uo pipefail
cd "$(dirname "$0")/.."

# SECONDS_TOTAL: no step may take what is not left of it.
total=${SECONDS_TOTAL:-570} peers=() dry=() parallel_steps=4
while (($#)); do
    case "$1" in
        --peers) peers=(--peers "$2"); shift 2 ;;
        --dry-run) dry=(--dry-run); shift ;;
        *) echo "unknown argument: $1" >&2; exit 2 ;;
    esac
done
python=${PYTHON:-python3}
out=${OUT:-gpu_results}
mkdir -p "$out"
out=$(cd "$out" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
: >"$out/summary.txt"
: >"$out/logs.txt"
# One compile thread: workers of torch.compile would outlive a benchmark that is stopped, and keep its pipe open.
export PYTHONUNBUFFERED=1 PYTHONFAULTHANDLER=1 COLUMNS=200 TORCHINDUCTOR_COMPILE_THREADS=1
# Steps side by side: threads of each would share the same cores.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-2}
export TRITON_CACHE_DIR="${TRITON_CACHE_DIR:-$work/triton}"
if ((${#dry[@]})); then
    export TRITON_INTERPRET=1 NSA_DRY_RUN=1 OMP_NUM_THREADS=1
    total=7200 parallel_steps=1
fi
if compgen -G "wheels/*.whl" >/dev/null; then
    "$python" -m pip install -q --no-index --no-deps --no-compile --target "$work/site" wheels/*.whl &&
        export PYTHONPATH="$work/site${PYTHONPATH:+:$PYTHONPATH}"
fi

say() { echo "$*" | tee -a "$out/summary.txt"; }

# step NAME SECONDS COMMAND...: all of the output to logs.txt, its last lines to the summary ($lines, more of a failure).
step() {
    local name=$1 seconds=$2 begin=$SECONDS left=$((total - SECONDS - 12)) status verdict log="$work/$1.log"
    shift 2
    ((seconds > left)) && seconds=$left
    if ((seconds < 10)); then
        say "== $name: not started, out of time"
        echo 1 >"$work/$name.status"
        return 1
    fi
    # Jobs in the background ignore SIGINT unless told otherwise; Python reports where it was when it gets one.
    timeout --signal=INT --kill-after=10 "$seconds" env --default-signal=INT "$@" >"$log" 2>&1
    status=$?
    echo "$status" >"$work/$name.status"
    verdict="exit code $status"
    ((status == 124 || status == 137)) && verdict="stopped after $seconds s"
    # One write each: steps that end at the same time do not mix their lines.
    printf '%s\n' "######## $name: $verdict
$(cat "$log")" >>"$out/logs.txt"
    say "== $name: $verdict, $((SECONDS - begin)) s
$(tail -n "$((status ? 40 : ${lines:-8}))" "$log")"
    return "$status"
}

# aside NAME SECONDS COMMAND...: a step in the background, so many at a time.
aside() {
    while (($(jobs -rp | wc -l) >= parallel_steps)); do wait -n; done
    step "$@" &
}

# share PERCENT: so much of the time that is left.
share() { echo $(((total - SECONDS - 12) * $1 / 100)); }

# bench NAME PERCENT ARGUMENTS...: a step of bench_kernels.py.
bench() {
    local name=$1 seconds
    seconds=$(share "$2")
    shift 2
    lines=80 step "$name" "$seconds" "$python" benchmarks/bench_kernels.py --seconds "$((seconds - 8))" \
        --output "$out/$name.json" "$@" "${dry[@]}"
}

command -v nvidia-smi >/dev/null && say "$(nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader)"
lines=20 step setup 60 "$python" benchmarks/check_setup.py "${dry[@]}"
(($? == 3)) && exit 3

# No conftest.py: it needs the transformers of the model, these tests do not. -v: the last line of a log names the test
# that was stopped. A synchronous launch fails where it was made, not somewhere after it.
pytest=(env CUDA_LAUNCH_BLOCKING=1 "$python" -m pytest --noconftest -p no:cacheprovider -v --tb=short --durations=3
    -o faulthandler_timeout=45)
# Most of their time is compilation on the CPU.
several=()
"$python" -c "import xdist" 2>/dev/null && ((${#dry[@]} == 0)) && several=(-n 3)

step production "$(share 20)" "${pytest[@]}" tests/test_gpu.py -k production

headline=()
((${#dry[@]})) || headline=(--tokens 32768 131072)
bench headline 20 --parts nsa dense "${headline[@]}"

seconds_tests=$(share 45)
tests=(compression selection rows_window rows_text attention dense branch_compression branch_selection branch_window
    branch_text repeat memcheck racecheck)
for name in "${tests[@]}"; do
    case "$name" in
        # Against the oracle, in float32 and half precision: the interpreter's tests, compiled and run on the GPU.
        dense) aside "$name" "$seconds_tests" "${pytest[@]}" tests/test_dense_causal.py ;;
        compression | selection | rows_window | rows_text | attention)
            aside "$name" "$seconds_tests" "${pytest[@]}" "${several[@]}" "tests/test_triton_$name.py" ;;
        # In bf16 and fp16, with tiles of the sizes that the model uses.
        branch_text) aside "$name" "$seconds_tests" "${pytest[@]}" tests/test_gpu.py -k text_rows ;;
        branch_*) aside "$name" "$seconds_tests" "${pytest[@]}" tests/test_gpu.py -k "branch and ${name#branch_}" ;;
        repeat) aside "$name" "$seconds_tests" "${pytest[@]}" tests/test_gpu.py -k repeated ;;
        *) aside "$name" "$seconds_tests" "${pytest[@]}" tests/test_gpu.py -k "sanitizer and $name" ;;
    esac
done
wait
step long "$(share 25)" "${pytest[@]}" tests/test_gpu.py -k overflow
tests=(production "${tests[@]}" long)
failed=()
for name in "${tests[@]}"; do
    [[ $(cat "$work/$name.status" 2>/dev/null) == 0 ]] || failed+=("$name")
done
say "== tests: ${#failed[@]} of ${#tests[@]} steps failed: ${failed[*]:-none}, $SECONDS s so far"

bench sweep 30 --parts sweep "${headline[@]}"
bench profile 15 --parts profile "${headline[@]}"
seconds=$(share 40)
lines=20 step prefill "$seconds" "$python" benchmarks/bench_prefill.py --seconds "$((seconds - 10))" \
    --output "$out/prefill.json" "${dry[@]}"
bench kernels 100 --plot "$out/kernels.png" --parts nsa dense branches text "${peers[@]}"
say "== all steps: $SECONDS s; tests that failed: ${failed[*]:-none}"
((${#failed[@]} == 0))

#!/usr/bin/env bash
# GPU tests and benchmarks on a CUDA machine, in under ten minutes and without a network.
#
#   OUT=results bash benchmarks/run_gpu.sh [--peers DIR]     # needs Python 3.10+, torch 2.11+, triton 3.6+, pytest
#   OUT=results bash benchmarks/run_gpu.sh --dry-run         # the same steps at tiny sizes, on the CPU
#
# Results go to the folder OUT (default: gpu_results): a log per step, kernels.json, kernels.png, prefill.json, and
# summary.txt, which has the end of every log. Each step has a time of its own and may fail alone. Wheels that lie in
# wheels/ are used in place of what is installed. The exit code is 0 if all tests passed.
set -uo pipefail
cd "$(dirname "$0")/.."

peers=() dry=() seconds_tests=170 seconds_oracle=70 seconds_kernels=175 seconds_prefill=100
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
: >"$out/summary.txt"
export PYTHONUNBUFFERED=1
if ((${#dry[@]})); then
    export TRITON_INTERPRET=1 NSA_DRY_RUN=1 OMP_NUM_THREADS=1
    seconds_tests=600 seconds_oracle=600 seconds_kernels=600 seconds_prefill=600
fi
if compgen -G "wheels/*.whl" >/dev/null; then
    site=$(mktemp -d)
    "$python" -m pip install -q --no-index --no-deps --no-compile --target "$site" wheels/*.whl &&
        export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}"
fi

say() { echo "$*" | tee -a "$out/summary.txt"; }

# step NAME SECONDS COMMAND...: output to NAME.log, its end to the summary.
step() {
    local name=$1 seconds=$2 begin=$SECONDS status
    shift 2
    timeout --signal=INT --kill-after=10 "$seconds" "$@" >"$out/$name.log" 2>&1
    status=$?
    local verdict="exit code $status"
    ((status == 124 || status == 137)) && verdict="stopped after $seconds s"
    say "== $name: $verdict, $((SECONDS - begin)) s"
    tail -n "${lines:-12}" "$out/$name.log" | tee -a "$out/summary.txt"
    return "$status"
}

begin=$SECONDS
command -v nvidia-smi >/dev/null && say "$(nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader)"
# No conftest.py: it needs the transformers of the model, these tests do not.
pytest=("$python" -m pytest --noconftest -p no:cacheprovider -q --durations=5)
step tests "$seconds_tests" "${pytest[@]}" tests/test_gpu.py
failed=$?
# The interpreter's tests, compiled and run on the GPU, in bf16 too. Most of their time is compilation on the CPU.
parallel=()
"$python" -c "import xdist" 2>/dev/null && ((${#dry[@]} == 0)) && parallel=(-n 8)
step oracle "$seconds_oracle" "${pytest[@]}" "${parallel[@]}" tests/test_triton_*.py
failed=$((failed || $?))
lines=60 step kernels "$((seconds_kernels + 15))" "$python" benchmarks/bench_kernels.py --seconds "$seconds_kernels" \
    --output "$out/kernels.json" --plot "$out/kernels.png" "${peers[@]}" "${dry[@]}"
step prefill "$((seconds_prefill + 15))" "$python" benchmarks/bench_prefill.py --seconds "$seconds_prefill" \
    --output "$out/prefill.json" "${dry[@]}"
say "all steps: $((SECONDS - begin)) s"
exit "$failed"

#!/bin/bash
# Usage: benchmarks/gpu_check.sh OUTDIR
# Builds the library on a machine with an NVIDIA GPU, a CUDA torch and nvcc, proves it there and measures it, in under 9
# minutes and without a network. Each part has a time limit; when one fails, the others still run, and the exit status
# is 1. Leaves in OUTDIR: log.txt (everything printed), *.jsonl (a row per measurement), and gpu_check.json and
# gpu_check.md, made of them by gpu_report.py. PYTHON names the interpreter (python3), COMMIT what is measured where there
# is no git.
set -u
[ $# -eq 1 ] || { sed -n '2,7s/^# //p' "$0"; exit 2; }
mkdir -p "$1"
out=$(realpath "$1")
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1
parts=$out/parts.tsv
: >"$parts"
: >"$out/log.txt"

part() {  # part NAME SECONDS COMMAND...
  local name=$1 limit=$2 begin=$SECONDS
  shift 2
  echo "=== $name"
  timeout --kill-after=5 "$limit" "$@"
  local status=$?
  printf '%s\t%s\t%s\n' "$name" "$status" "$((SECONDS - begin))" >>"$parts"
  [ $status -eq 0 ] || echo "=== $name FAILED with status $status"
}

# The limits add up to less than 9 minutes.
everything() {
  part "machine" 10 nvidia-smi
  part "build" 120 "$python" setup.py --quiet build_ext --inplace
  part "doctor" 30 "$python" -m sparse_adv doctor
  local workers=()
  "$python" -c 'import xdist' 2>/dev/null && workers=(-n 8 --dist loadfile)
  part "tests" 150 "$python" -m pytest -q -p no:cacheprovider "${workers[@]}"
  part "memcheck" 45 compute-sanitizer --tool memcheck --error-exitcode 1 \
    "$python" -m pytest -q -p no:cacheprovider -k "cuda and (step_takes_any or start_is or promised)" tests/ops/test_devices.py
  part "pgd_step" 30 "$python" benchmarks/bench_pgd_step.py --device cuda --out "$out/pgd_step.jsonl"
  part "masked_conv2d" 60 "$python" benchmarks/bench_masked_conv2d_cuda.py --out "$out/masked_conv2d.jsonl"
  part "attack" 60 "$python" benchmarks/bench_attack.py --device cuda --out "$out/attack.jsonl"
  part "shrink" 30 "$python" benchmarks/bench_shrink.py --device cuda --out "$out/shrink.jsonl"
}

everything 2>&1 | tee "$out/log.txt"
"$python" benchmarks/gpu_report.py "$out" || exit 1
awk -F'\t' '$2 != 0 { failed = 1 } END { exit failed }' "$parts"

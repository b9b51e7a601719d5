#!/bin/bash
# Usage: benchmarks/gpu_check.sh OUTDIR
# Builds the library on a machine with an NVIDIA GPU, a CUDA torch and nvcc, proves it there and measures it, in under 9
# minutes and without a network. Each part has a time limit; when one fails, the others still run, and the exit status
# is 1. Leaves in OUTDIR, of each part, what it printed (PART.log) and measured (PART.jsonl), and gpu_check.json and
# gpu_check.md, which gpu_report.py makes of them. PYTHON names the interpreter (python3), COMMIT what is measured (what
# git says).
set -u
[ $# -eq 1 ] || { sed -n '2,8s/^# //p' "$0"; exit 2; }
mkdir -p "$1" || exit 2
out=$(realpath "$1")
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
pytest=("$python" -m pytest -v --tb=short -p no:cacheprovider)
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1
parts=$out/parts.tsv note=
: >"$parts"

part() {  # part NAME SECONDS COMMAND...
  local name=$1 limit=$2 begin=$SECONDS status
  shift 2
  rm -f "$out/$name.jsonl"
  echo "=== $name, at most $limit s"
  timeout --kill-after=5 "$limit" "$@" >"$out/$name.log" 2>&1
  status=$?
  printf '%s\t%s\t%s\t%s\t%s\n' "$name" "$status" "$((SECONDS - begin))" "$limit" "$note" >>"$parts"
  [ $status -eq 0 ] || echo "=== $name FAILED with status $status"
}

# The limits add up to less than 9 minutes.
part machine 10 nvidia-smi
part build 75 "$python" setup.py --quiet build_ext --inplace
part doctor 15 "$python" -m sparse_adv doctor
# Each of these makes a native op throw. Should that end the process, it is this one.
part native_errors 30 "${pytest[@]}" -k "refuse or crashes" \
  tests/ops/test_masked_conv2d_pattern.py tests/ops/test_pgd_step.py tests/ops/test_random_start.py tests/ops/test_devices.py
if "$python" -c 'import xdist' 2>/dev/null; then
  # Not by files: a test that ends its worker would then be handed to the next worker, and on.
  cores=$(nproc)
  tests=(-n $((cores > 4 ? cores - 2 : cores)) --dist worksteal)
else
  note="only what needs a GPU: without pytest-xdist, which is not installed, all tests would take too long"
  tests=(-k "cuda or gpu" tests/ops/test_devices.py tests/attacks/test_cuda_graph.py tests/training/test_loop.py tests/training/test_evaluation.py)
fi
part tests 130 env OMP_NUM_THREADS=1 "${pytest[@]}" "${tests[@]}"
note=
# Every tensor an allocation of its own: within the blocks that PyTorch keeps, memcheck sees no access out of bounds.
part memcheck 45 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
  compute-sanitizer --tool memcheck --target-processes application-only --error-exitcode 1 "${pytest[@]}" \
  -k "cuda and (step_takes_any or start_gives or normalised or (blocks_with and bfloat16))" tests/ops/test_devices.py
part pgd_step 30 "$python" benchmarks/bench_pgd_step.py --device cuda --out "$out/pgd_step.jsonl"
part masked_conv2d 50 "$python" benchmarks/bench_masked_conv2d_cuda.py --out "$out/masked_conv2d.jsonl"
part attack 55 "$python" benchmarks/bench_attack.py --device cuda --network resnet18 --out "$out/attack.jsonl"
part attack_wrn 70 "$python" benchmarks/bench_attack.py --device cuda --network wrn-34-10 --out "$out/attack_wrn.jsonl"
part shrink 25 "$python" benchmarks/bench_shrink.py --device cuda --out "$out/shrink.jsonl"

"$python" benchmarks/gpu_report.py "$out" || exit 1
awk -F'\t' '$2 != 0 { failed = 1 } END { exit failed }' "$parts"

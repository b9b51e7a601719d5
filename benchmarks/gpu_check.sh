#!/bin/bash
# Usage: benchmarks/gpu_check.sh OUTDIR [PART...]
# Builds the library on a machine with an NVIDIA GPU, a CUDA torch and nvcc, tests it there and measures it, in under 20
# minutes and without internet access. Each part has a time limit. If a part fails, the others still run, and the exit status
# is 1. Writes to OUTDIR the output (PART.log) and the measured rows (PART.csv) of each part, and gpu_check.json and
# gpu_check.md, which gpu_report.py makes of them. PART...: only these. Environment variables: PYTHON is the interpreter
# (default: python3), COMMIT the name of the version that is measured (default: git's description).
set -u
shopt -s extglob
[ $# -ge 1 ] || { sed -n '2,8s/^# //p' "$0"; exit 2; }
known=" $(sed -nE 's/^(part|measure) ([a-z0-9_]+) [0-9].*/\2/p' "$0" | xargs) "
for name in "${@:2}"; do
  [[ $known == *" $name "* ]] || { echo "gpu_check.sh: no part '$name', only$known"; exit 2; }
done
mkdir -p "$1" || exit 2
out=$(realpath "$1") chosen=" ${*:2} "
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
pytest=("$python" -m pytest -v --tb=short -p no:cacheprovider)
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
parts=$out/parts.tsv note=
: >"$parts"

part() {  # part NAME SECONDS COMMAND...
  local name=$1 limit=$2 begin=$SECONDS status
  shift 2
  [[ $chosen == "  " || $chosen == *" $name "* ]] || return
  rm -f "$out/$name.csv"
  echo "=== $name, at most $limit s"
  timeout --kill-after=5 "$limit" "$@" >"$out/$name.log" 2>&1
  status=$?
  printf '%s\t%s\t%s\t%s\t%s\n' "$name" "$status" "$((SECONDS - begin))" "$limit" "$note" >>"$parts"
  [ $status -eq 0 ] || echo "=== $name FAILED with status $status"
}

# The limits add up to 1181 seconds. They allow for a Triton that has compiled nothing yet: on an H200 the tests then took
# more than 138 seconds, and doctor 10 before it compiled any.
part machine 5 nvidia-smi
part build 60 "$python" setup.py --quiet build_ext --inplace
part doctor 45 "$python" -m sparse_adv doctor
# In these tests native ops throw. If that ends the process, only this part is lost.
part native_errors 30 "${pytest[@]}" -k "refuse or crashes" \
  tests/ops/test_masked_conv2d_pattern.py tests/ops/test_pgd_step.py tests/ops/test_random_start.py tests/ops/test_devices.py
# What is left out of the tests takes minutes of CPU time and tests the checkout, not the machine. The benchmarks run
# below, and what two processes do on one GPU did not end in time with the others on an H100.
shared=test_processes_that_share_a_gpu_continue_bit_for_bit
if "$python" -c 'import xdist' 2>/dev/null; then
  # Some tests of training take half a minute. They come first and are handed out a few at a time, so that no worker is
  # left with several of them in the end. Not --dist loadfile: pytest-xdist would hand a test that ends its worker to
  # the next worker, up to four times the number of workers.
  cores=$(nproc)
  workers=(-n $((cores > 4 ? cores - 2 : cores)) --dist load --maxschedchunk 10 --durations=10)
else
  note="one after the other, and no other tests: without pytest-xdist, which is not installed, they would take too long"
  workers=()
fi
part tests 150 env OMP_NUM_THREADS=1 "${pytest[@]}" "${workers[@]}" -k "(cuda or gpu) and not $shared" \
  --ignore tests/training/test_captured_cuda.py tests/!(packaging|benchmarks)
[[ $note ]] || part other_tests 240 env OMP_NUM_THREADS=1 "${pytest[@]}" "${workers[@]}" -k "not (cuda or gpu)" \
  tests/training tests/!(training|packaging|benchmarks) sparse_adv
note=
part shared_gpu 90 "${pytest[@]}" -o faulthandler_timeout=80 -k $shared tests/training/test_distributed.py
# Each tensor gets an allocation of its own: memcheck sees no access out of bounds within a block that PyTorch caches.
part memcheck 45 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
  compute-sanitizer --tool memcheck --target-processes application-only --error-exitcode 1 "${pytest[@]}" \
  -k "cuda and (step_takes_any or start_gives or normalised or (batch_norm_act and bfloat16) or max_pooling or (blocks_with and bfloat16) or blocks_give)" \
  tests/ops/test_devices.py tests/engine/test_networks.py
measure() {  # measure NAME SECONDS BENCHMARK ARGUMENTS...
  local name=$1 limit=$2 benchmark=$3
  shift 3
  part "$name" "$limit" "$python" "benchmarks/bench_$benchmark.py" --device cuda --out "$out/$name.csv" "$@"
}
# Updates as CUDA graphs against the same updates without, bit for bit.
part captured 110 "${pytest[@]}" tests/training/test_captured_cuda.py
measure pgd_ops 45 pgd_ops
measure batch_norm_act 40 batch_norm_act
measure masked_conv2d 36 masked_conv2d
measure attack 90 attack --network resnet18
measure update 80 update
measure attack_wrn 85 attack --network wrn-34-10
measure shrink 30 shrink

"$python" benchmarks/gpu_report.py "$out" || exit 1
awk -F'\t' '$2 != 0 { failed = 1 } END { exit failed }' "$parts"

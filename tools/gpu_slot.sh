#!/usr/bin/env bash
# What a short time on one GPU is for, the most important first: 8 minutes at most, no network.
#
#   tools/gpu_slot.sh             on a GPU; needs torch, pytest with xdist, rich and tqdm, and a wheel in dist/ or nvcc
#   tools/gpu_slot.sh --dry-run   the same steps on a CPU, over doubles of torch.cuda and on tiny sizes
#
# $OUT (default: build/gpu_slot) gets results.jsonl, where each row of a benchmark and each step (its exit status and
# seconds) is a line as soon as it is there, and a log for each step. A step has a time limit of its own, and one that
# fails does not end the rest. SLOT_SECONDS (default: 470) is the limit of all. The exit status is 1 where a step failed.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
OUT=${OUT:-build/gpu_slot}
mkdir -p "$OUT"
RESULTS=$OUT/results.jsonl
: > "$RESULTS"
SECONDS=0
LIMIT=${SLOT_SECONDS:-470}
PYTHON=${PYTHON:-python3}
DEVICE=cuda
IS_DRY=
FAILED=0
[[ ${1:-} == --dry-run ]] && IS_DRY=1 DEVICE=stub LIMIT=${SLOT_SECONDS:-1800}
export PYTHONUNBUFFERED=1
# A dry run tests the installed package: these sources may have no extension.
[[ $IS_DRY ]] || export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}

# step NAME SECONDS COMMAND...: runs the command for at most SECONDS, and no longer than all may take.
step() {
  local name=$1 limit=$2 start=$SECONDS status
  shift 2
  [[ $IS_DRY ]] && limit=600 # other programs may be running too
  ((limit > LIMIT - SECONDS)) && limit=$((LIMIT - SECONDS))
  if ((limit < 3)); then
    echo "{\"step\": \"$name\", \"skipped\": \"no time is left\"}" | tee -a "$RESULTS"
    return
  fi
  echo "== $name (at most $limit s, $SECONDS s in)"
  timeout --kill-after=5 "$limit" "$@" > "$OUT/$name.log" 2>&1
  status=$?
  ((status == 0)) || FAILED=$((FAILED + 1))
  tail -n "${SHOWN:-6}" "$OUT/$name.log"
  echo "{\"step\": \"$name\", \"status\": $status, \"seconds\": $((SECONDS - start))}" | tee -a "$RESULTS"
}

versions() {
  nvidia-smi --query-gpu=name,driver_version,clocks.max.sm,clocks.max.mem,memory.total --format=csv || true
  nvcc --version | tail -n 2 || true
  "$PYTHON" -c 'import platform, torch; print(platform.python_version(), torch.__version__, torch.version.cuda)'
  "$PYTHON" -c 'import triton; print("triton", triton.__version__)' || true
  "$PYTHON" -m pip list 2> /dev/null | grep -iE 'bitsandbytes|peft|transformers|numpy' || true
  lscpu | grep 'Model name' || true
}

# The extension into lowbit/: of the carried wheel, or built for this GPU alone, as many files at once as there are cores.
extension() {
  local wheel
  wheel=$(find dist -name 'lowbit*.whl' 2> /dev/null | head -n 1)
  if [[ $wheel ]]; then
    "$PYTHON" -m zipfile -e "$wheel" build/gpu_slot_wheel && cp build/gpu_slot_wheel/lowbit/_C.*so lowbit/
  fi
  if [[ $IS_DRY ]] || "$PYTHON" -c 'import torch, lowbit; assert "cuda" in lowbit.backends.native.DEVICE_TYPES'; then
    return
  fi
  LOWBIT_CUDA=1 LOWBIT_CUDA_ARCHS=$("$PYTHON" -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())') \
    MAX_JOBS=$(nproc) "$PYTHON" setup.py build_ext --inplace
}

matmul() { "$PYTHON" benchmarks/bench_matmul.py --device "$DEVICE" --dtype bfloat16 --jsonl "$RESULTS" "$@" ${IS_DRY:+--quick}; }
train() { "$PYTHON" benchmarks/bench_train.py --device "$DEVICE" --dtype bfloat16 --jsonl "$RESULTS" "$@" ${IS_DRY:+--quick}; }
tests() { "$PYTHON" -m pytest -q -p no:cacheprovider ${IS_DRY:+--collect-only} "$@"; }
kernels() { # the counters of three kernels
  if [[ $IS_DRY ]] || ! command -v ncu > /dev/null; then
    echo "ncu: not here"
    return
  fi
  ncu --set full --launch-count 3 --kernel-name regex:'gemv|gemm|dequantize' \
    "$PYTHON" benchmarks/bench_matmul.py --device "$DEVICE" --dtype bfloat16 --ops linear --shapes 4096x4096 --m 1,64,2048 --rounds 1
}
export -f versions extension matmul train tests kernels
export PYTHON DEVICE IS_DRY RESULTS

SHAPES="4096x4096 14336x4096 4096x14336 8192x28672"
SHOWN=12 step versions 20 bash -c versions
step extension 150 bash -c extension
SHOWN=30 step selftest 60 "$PYTHON" -m lowbit
step test_gpu 90 bash -c "tests -n 12 tests/test_gpu.py"
SHOWN=60 step products 90 bash -c "matmul --ops linear --m 1,16,128,512,2048 --shapes $SHAPES --rounds 7"
SHOWN=16 step train_8192 60 bash -c "train --model 8b-8-layers --batch 4 --length 2048 --steps 3 ${IS_DRY:+--contenders lowbit}"
SHOWN=16 step train_512 45 bash -c "train --model 8b-8-layers --batch 1 --length 512 --steps 5"
SHOWN=30 step rest 60 bash -c "matmul --ops backward,dequantize,quantize,search,overhead --m 1,64,512,2048 --shapes 4096x4096 --rounds 7"
step test_gpu_triton 60 bash -c "tests -n 12 tests/test_gpu_triton.py"
SHOWN=60 step more_rows 60 bash -c "matmul --ops linear --m 4,8,64,256 --shapes $SHAPES --rounds 7"
step ncu 45 bash -c kernels
echo "$SECONDS s; $FAILED steps failed; results: $RESULTS"
((FAILED == 0))

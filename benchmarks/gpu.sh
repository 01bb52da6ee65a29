#!/usr/bin/env bash
# All that a GPU is asked for. Each part is stopped at its limit: nine minutes for tests, nine and a half for figures,
# five for crossovers; what figures has measured by then is in its file. So one part at a time fits into calls of ten
# minutes, and all three into half an hour.
#
#   benchmarks/gpu.sh [tests|figures|crossovers]... [--to FOLDER] [--commit HASH]
#
# tests: tests/test_cuda.py. figures: every row of gpu.py into FOLDER/gpu.csv (benchmarks/results, from where
# benchmarks/tables.py takes README's table). crossovers: the ways of the linear layer and of the convolution's gradients.
# Nothing has to be built or installed: PyTorch, Triton, pytest and hypothesis are enough. Where the GPU is on a machine
# that keeps nothing but one folder, say so, or all is lost: --to "$OUT".
set -uo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONWARNINGS=ignore PYTHONUNBUFFERED=1
folder=benchmarks/results commit='' parts=() status=0
while (($#)); do
  case $1 in
    --to) folder=$2; shift ;;
    --commit) commit=$2; shift ;; # of a copy without git
    *) parts+=("$1") ;;
  esac
  shift
done
mkdir -p "$folder"
for part in "${parts[@]:-figures}"; do
  case $part in
    tests)
      python3 -c 'import xdist' 2>/dev/null && several=(-n 8) || several=() # most of the time is Triton's compiler's
      timeout 540 python3 -m pytest -p no:cacheprovider tests/test_cuda.py ${several[@]+"${several[@]}"} --tb=short \
        --durations=10 -o faulthandler_timeout=120 -o faulthandler_exit_on_timeout=true ;;
    figures) timeout 570 python3 benchmarks/gpu.py --commit "$commit" --csv "$folder/gpu.csv" ;;
    crossovers) timeout 300 python3 benchmarks/gpu_crossovers.py ;;
    *) echo "gpu.sh: wants tests, figures or crossovers, got $part" >&2; false ;;
  esac 2>&1 | tee "$folder/$part.log" || status=1
done
exit $status

#!/usr/bin/env bash
# All that a GPU is asked for; each part takes less than ten minutes.
#
#   benchmarks/gpu.sh [tests|figures|crossovers]... [--to FOLDER] [--commit HASH]
#
# tests: tests/test_cuda.py. figures: every row of gpu.py into FOLDER/gpu.csv (benchmarks/results, from where
# benchmarks/tables.py takes README's table). crossovers: the ways of the linear layer and of the convolution's gradients.
# Nothing has to be built or installed: PyTorch, Triton, pytest and hypothesis are enough.
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
      python3 -m pytest -p no:cacheprovider tests/test_cuda.py ${several[@]+"${several[@]}"} --tb=short --durations=10 ;;
    figures) python3 benchmarks/gpu.py --commit "$commit" --csv "$folder/gpu.csv" ;;
    crossovers) python3 benchmarks/gpu_crossovers.py ;;
    *) echo "gpu.sh: wants tests, figures or crossovers, got $part" >&2; false ;;
  esac 2>&1 | tee "$folder/$part.log" || status=1
done
exit $status

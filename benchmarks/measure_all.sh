#!/usr/bin/env bash
# Takes every CPU figure of README.md and docs/performance.md again and writes their tables and plot. Run it on an idle machine.
# measure_all.sh [FOLDER]: FOLDER below benchmarks/results, for a processor whose figures stand apart.
set -euo pipefail
cd "$(dirname "$0")/.."
results=benchmarks/results/${1:-.}
mkdir -p "$results"
for threads in 1 2; do
  python benchmarks/compare_dense.py --full --threads "$threads" --csv "$results/compare_dense_$threads.csv"
done
python benchmarks/roofline.py --csv "$results/roofline.csv"
python benchmarks/never_slower.py --csv "$results/never_slower.csv" || echo "some cases are slower than dense: see the table"
python benchmarks/tables.py

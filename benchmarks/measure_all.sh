#!/usr/bin/env bash
# Takes every CPU figure of README.md and docs/performance.md again and writes their tables and plot. Run it on an idle machine.
set -euo pipefail
cd "$(dirname "$0")/.."
results=benchmarks/results
mkdir -p "$results"
for threads in 1 2; do
  python benchmarks/compare_dense.py --full --threads "$threads" --csv "$results/compare_dense_$threads.csv"
done
python benchmarks/roofline.py --csv "$results/roofline.csv"
python benchmarks/never_slower.py --csv "$results/never_slower.csv" || echo "some cases are slower than dense: see the table"
python benchmarks/tables.py

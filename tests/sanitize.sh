#!/usr/bin/env bash
# The op tests under AddressSanitizer and UndefinedBehaviourSanitizer, once for each instruction set. The extension is
# built apart, in build/sanitize. Arguments go to pytest in the place of the op tests.
set -euo pipefail
cd "$(dirname "$0")/.."
CMAKE_ARGS=-DSPARSEKERN_SANITIZE=ON python setup.py --quiet build --build-base build/sanitize --build-lib build/sanitize/lib
compiler=${CXX:-c++}
export PYTHONPATH=$PWD/build/sanitize/lib
# Python itself is not sanitized, so the libraries have to be there first; what Python leaves at exit is no leak of ours.
export LD_PRELOAD="$($compiler -print-file-name=libasan.so) $($compiler -print-file-name=libubsan.so)"
export ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1
tests=(tests/test_{k_winners,conv_k_winners,max_pool,norm,sparse_linear,sparse_conv2d,grad_bias,bad_input,edge_input}.py)
for capability in default avx2 avx512; do
  echo "== ATEN_CPU_CAPABILITY=$capability"
  export ATEN_CPU_CAPABILITY=$capability
  python -P -c "import sparsekern._C as C; assert C.__file__.startswith('$PYTHONPATH'); print(C.instruction_set())"
  python -P -m pytest -x "${@:-${tests[@]}}"
done

#!/usr/bin/env bash
# Build, tests and benchmarks on a CUDA device, in one report: benchmarks/gpu.sh [REPORT]
# Under 8 minutes. Needs Python with torch for CUDA, nvcc of the same major version, and a C++ compiler.
set -uo pipefail
cd "$(dirname "$0")/.."
report=$(realpath -m "${1:-out/gpu.md}")
python=${PYTHON:-python3}
venv=build/gpu
mkdir -p "$(dirname "$report")"
failed=0

# Title, seconds it may take, command: its output and how it ended go into the report.
part() {
  local title=$1 limit=$2 start=$SECONDS status
  shift 2
  echo "== $title"
  printf '\n## %s\n\n```\n$ %s\n' "$title" "$*" >>"$report"
  timeout "$limit" "$@" 2>&1 | tee -a "$report"
  status=${PIPESTATUS[0]}
  printf '```\n\nExit status %s after %s s.\n' "$status" "$((SECONDS - start))" >>"$report"
  [ "$status" = 0 ] || failed=1
}

build() {
  "$python" -m venv --system-site-packages $venv &&
    $venv/bin/pip install --quiet "scikit-build-core>=0.10" "pybind11>=2.13" "cmake>=3.24" ninja &&
    $venv/bin/pip install --quiet --no-build-isolation -Cbuild-dir=build/gpu-objects \
      -Ccmake.define.MNP_FAST_CUDA=ON -Ccmake.define.CMAKE_CUDA_ARCHITECTURES=native \
      --editable ".[test]"
}
export -f build
export python venv

printf '# mnp_fast on a CUDA device\n\n%s, %s.\n' "$(date -u +%F)" "$(git rev-parse --short HEAD)" >"$report"
part "Device" 15 nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.max.sm --format=csv
part "Build" 120 bash -c build
part "What is used" 20 $venv/bin/mnp-fast info
part "Tests" 120 $venv/bin/python -m pytest -m gpu -q
if command -v compute-sanitizer >/dev/null; then
  part "Memory checks" 45 compute-sanitizer --error-exitcode 1 $venv/bin/python -m pytest -m gpu -q \
    tests/gpu -k "affine and dtype0 or magnitude or update"
fi
part "Benchmarks" 150 $venv/bin/python -m benchmarks.run --device cuda --json "${report%.md}.json"
echo "Report: $report"
exit $failed

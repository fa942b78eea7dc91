#!/usr/bin/env bash
# Build, tests and benchmarks on a CUDA device, in one report: benchmarks/gpu.sh [REPORT]
# Under 8 minutes. Needs Python with torch for CUDA, nvcc of the same major version, and a C++ compiler.
set -uo pipefail
cd "$(dirname "$0")/.."
report=$(realpath -m "${1:-out/gpu.md}")
python=${PYTHON:-python3}
venv=build/gpu
failed=0

# What is missing on this machine, if anything.
missing() {
  "$python" - <<'CHECK' || return
try:
    import torch
except ImportError as error:
    print(f"python cannot import torch: {error}")
else:
    if torch.version.cuda is None:
        print(f"torch {torch.__version__} has no CUDA")
    elif not torch.cuda.is_available():
        print(f"torch {torch.__version__} finds no CUDA device")
CHECK
  PATH="${CUDA_HOME:-/usr/local/cuda}/bin:$PATH" command -v nvcc >/dev/null || echo "there is no nvcc"
}

why=$(missing) || why="$python does not run"
if [ -n "$why" ]; then
  printf 'benchmarks/gpu.sh needs a CUDA device, torch for CUDA and nvcc: %s\n' "$why" >&2
  exit 2
fi

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
  return "$status"
}

end() {
  printf '\n%s s in all.\n' "$SECONDS" >>"$report"
  echo "Report: $report"
  exit $failed
}

# In an environment of its own, which takes torch from where `python` has it: the system, or another one.
build() {
  local packages='import sysconfig; print(sysconfig.get_path("purelib"))'
  "$python" -m venv --system-site-packages $venv &&
    "$python" -c "$packages" >"$($venv/bin/python -c "$packages")/base.pth" &&
    $venv/bin/pip install --quiet "scikit-build-core>=0.10" "pybind11>=2.13" "cmake>=3.24" ninja \
      "pytest>=8" &&
    $venv/bin/pip install --quiet --no-build-isolation -Cbuild-dir=build/gpu-objects \
      -Ccmake.define.MNP_FAST_CUDA=ON -Ccmake.define.CMAKE_CUDA_ARCHITECTURES=native --editable .
}
export -f build
export python venv

mkdir -p "$(dirname "$report")"
printf '# mnp_fast on a CUDA device\n\n%s, %s.\n' "$(date -u +%F)" "$(git rev-parse --short HEAD)" >"$report"
part "Device" 15 nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.max.sm --format=csv
part "Build" 120 bash -c build || end  # nothing else can run
part "What is used" 20 $venv/bin/mnp-fast info
test=($venv/bin/python -m pytest -m gpu -q --durations=5)
part "Tests" 50 "${test[@]}" tests/gpu --deselect tests/gpu/test_sanitizer.py
part "Tests of Triton" 95 "${test[@]}" tests/triton
part "Memory checks" 60 "${test[@]}" tests/gpu/test_sanitizer.py
part "Benchmarks" 115 $venv/bin/python -m benchmarks.run --device cuda --seconds 80 \
  --json "${report%.md}.json"
end

#!/usr/bin/env bash
# Every faster mode beside bfloat16 on one GPU at Nano's size with random weights: benchmarks/modes.sh OUT
# OUT gets what the tests say, reports of benchmarks/latency.py for each kind of weights, with peaks, and plans.
# About 25 minutes on an H200; parts: PARTS="tests latency memory" (default: all).
set -euo pipefail
out=$(mkdir -p "$1" && cd "$1" && pwd); cd "$(dirname "$0")/.."
parts=${PARTS:-tests latency memory}
declare -A engines=(
  [bf16]='{}'
  [fp8]='{"quantization": "fp8"}'
  [fp8-every-step]='{"quantization": "fp8", "fp8_first_steps": 0, "fp8_last_steps": 0, "fp8_text": "native"}'
)
vllm-cosmos3 make-checkpoint "$out/nano" --size nano --no-weights --force
if [[ $parts == *tests* ]]; then
  python -m pytest -q -rP -p no:cacheprovider tests/gpu/test_fp8_on_gpu.py tests/gpu/test_generator_on_gpu.py > "$out/tests.txt" || true
  tail -3 "$out/tests.txt"
fi
for name in bf16 fp8 fp8-every-step; do
  common=(--load-format dummy --engine "${engines[$name]}")
  if [[ $parts == *latency* ]]; then
    python benchmarks/latency.py "$out/nano" "${common[@]}" --repeat 1 --measured-steps 4 --profile --json "$out/latency-$name.json" \
      --rows t2i-256p t2i-720p t2v-256p t2v-480p t2v-720p | tee "$out/latency-$name.txt"
    python benchmarks/latency.py "$out/nano" "${common[@]}" --repeat 1 --save --json "$out/faster-$name.json" \
      --rows t2i-720p-sea t2v-256p-sea t2v-480p-sea t2v-480p-4step i2v-480p-4step t2v-720p-4step | tee "$out/faster-$name.txt"
  fi
done
if [[ $parts == *memory* ]]; then
  python benchmarks/memory.py "$out/nano" --quantization fp8 --json "$out/memory-fp8.json" | tee "$out/memory-fp8.txt"
fi

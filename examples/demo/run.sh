#!/usr/bin/env bash
# Distils SmolLM2-135M-Instruct into 20 of its 30 layers on two CPU ranks: prepare, train, report, summary.
# `make demo` runs it in an environment of its own. DEMO_DIR (default runs/demo) is where everything goes.
set -euo pipefail
cd "$(dirname "$0")/../.."
start=$SECONDS
directory="${DEMO_DIR:-runs/demo}"
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
# Freed buffers of some MiB go back to the system at once instead of staying with the process.
export MALLOC_MMAP_THRESHOLD_=4194304
precision=fp32
if grep -qw avx512_bf16 /proc/cpuinfo; then precision=bf16; fi

python tools/prepare_demo.py --output "$directory/inputs"
if [ -d "$directory/run/student" ]; then rm -rf "$directory/run"; fi  # a finished run; one that was stopped goes on
torchrun --nproc-per-node 2 -m megatron_amd.train --config examples/demo/demo.yaml \
    "run.directory=$directory/run" "training.precision=$precision" \
    "teacher.path=$directory/inputs/teacher" "student.path=$directory/inputs/teacher" \
    "data.train=$directory/inputs/train.jsonl" "data.evaluation=$directory/inputs/heldout.jsonl" "$@"
python tools/report.py "$directory/run"
python examples/demo/summary.py "$directory/run" --seconds $((SECONDS - start))

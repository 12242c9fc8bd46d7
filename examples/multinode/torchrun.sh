#!/usr/bin/env bash
# One node's part of a multi-node run, without a scheduler. On every node, with the first one's name:
#
#   NODES=2 FIRST_NODE=node0 examples/multinode/torchrun.sh --config examples/gpt/openllama_dolly.yaml
#
# RANKS_PER_NODE (8), PORT (29400) and RUN_ID (megatron_amd) may be set too, alike on all nodes. run.directory and the
# models' paths must lie on a file system that all nodes share.
set -euo pipefail
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-8}" CUDA_DEVICE_MAX_CONNECTIONS=1
exec torchrun \
    --nnodes "${NODES:?how many nodes take part}" \
    --nproc-per-node "${RANKS_PER_NODE:-8}" \
    --rdzv-id "${RUN_ID:-megatron_amd}" \
    --rdzv-backend c10d \
    --rdzv-endpoint "${FIRST_NODE:?name of the first node}:${PORT:-29400}" \
    --max-restarts 0 \
    -m megatron_amd.train "$@"

#!/usr/bin/env bash
# Two nodes, played by two torchrun agents on this machine: the rehearsal of a multi-node run.
#
#   examples/multinode/two_agents.sh --config run.yaml [section.field=value ...]
#
# On real nodes, run the torchrun command below once on each, with --rdzv-endpoint naming the first one. PORT chooses
# another port than 29400, RANKS_PER_NODE another number of ranks than 1.
set -euo pipefail

agent() {
    torchrun \
        --nnodes 2 \
        --nproc-per-node "${RANKS_PER_NODE:-1}" \
        --rdzv-id "two-agents-${PORT:-29400}" \
        --rdzv-backend c10d \
        --rdzv-endpoint "localhost:${PORT:-29400}" \
        -m megatron_amd.train "$@"
}

agent "$@" &
first=$!
agent "$@" &
second=$!
trap 'kill -TERM "$first" "$second" 2>/dev/null || true' INT TERM

# Both are waited for, whatever the first one's end: each agent stops by itself when the other has failed.
status=0
wait "$first" || status=$?
wait "$second" || status=$?
exit "$status"

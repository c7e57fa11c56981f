#!/usr/bin/env bash
# Several nodes: run this on each, with the same NNODES and MASTER_ADDR and its own NODE_RANK.
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=node0 DATA_PATH=... SAVE_PATH=... bash configs/launch_multinode.sh
# SAVE_PATH must be on a file system that all nodes share.
set -euo pipefail
torchrun --nproc_per_node="${GPUS_PER_NODE:-8}" --nnodes="${NNODES:?}" --node_rank="${NODE_RANK:?}" \
    --master_addr="${MASTER_ADDR:?}" --master_port="${MASTER_PORT:-12345}" \
    -m virft_fast.train \
    --config "${CONFIG:-configs/visual_rft_2b.yaml}" \
    --deepspeed configs/zero3.json \
    --dataset_name "${DATA_PATH:?}" \
    --output_dir "${SAVE_PATH:?}" \
    "$@"

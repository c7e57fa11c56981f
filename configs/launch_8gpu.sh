#!/usr/bin/env bash
# One node, 8 GPUs: Visual-RFT's launch line with the program replaced.
#   DATA_PATH=... SAVE_PATH=... bash configs/launch_8gpu.sh [more flags]
set -euo pipefail
torchrun --nproc_per_node=8 --nnodes=1 --node_rank=0 --master_addr=127.0.0.1 --master_port=12345 \
    -m virft_fast.train \
    --output_dir "${SAVE_PATH:?}" \
    --model_name_or_path "${CKPT_PATH:-Qwen/Qwen2-VL-2B-Instruct}" \
    --dataset_name "${DATA_PATH:?}" \
    --deepspeed configs/zero3.json \
    --max_prompt_length 1024 \
    --per_device_train_batch_size 1 \
    --gradient_accumulation_steps 2 \
    --logging_steps 1 \
    --bf16 \
    --report_to "${REPORT_TO:-none}" \
    --gradient_checkpointing false \
    --attn_implementation flash_attention_2 \
    --max_pixels 401408 \
    --num_train_epochs 1 \
    --run_name "${RUN_NAME:-Qwen2-VL-2B_GRPO}" \
    --save_steps 100 \
    --save_only_model true \
    --num_generations 8 \
    "$@"

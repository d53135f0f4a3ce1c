#!/usr/bin/env bash
# LoRA fine-tuning of a 16-bit Qwen model in one process: on one GPU, or, slowly, on the CPU.
# Trains small matrices beside the model's own, which stay as they are. The output folder is an adapter: try it with
# `python -m finetune.ask OUTPUT`, make a model of it that stands alone with `python -m finetune.merge OUTPUT MERGED`.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"
. "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")/launch.sh"

model=Qwen/Qwen-7B
output=output_qwen

# An optimizer step takes per_device_train_batch_size x gradient_accumulation_steps conversations. --bf16 needs a GPU
# that has it (since Ampere); elsewhere add --fp16. --eval_data_path gives held-out conversations to evaluate on.
hyperparameters=(
    --use_lora True
    --bf16 True
    --num_train_epochs 5
    --per_device_train_batch_size 2
    --gradient_accumulation_steps 8
    --learning_rate 3e-4
    --lr_scheduler_type cosine
    --warmup_ratio 0.01
    --weight_decay 0.1
    --adam_beta2 0.95
    --model_max_length 512
    --save_strategy steps
    --save_steps 1000
    --save_total_limit 10
    --logging_steps 1
    --report_to none
)
launch_single_process "$@"

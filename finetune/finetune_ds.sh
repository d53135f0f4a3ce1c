#!/usr/bin/env bash
# Full-parameter fine-tuning on several GPUs, of one machine or several (docs/several_machines.md), with DeepSpeed ZeRO-3.
# All parameters train, and each GPU holds its share of them: 18 bytes a parameter are split over the GPUs (weights in
# bf16 and in float32, gradients, two moments of AdamW; a 7B model about 138 GB, so 17 GB on each of 8 GPUs), and besides
# 2 bytes for each parameter of the layers at work, and the activations. The output folder is a whole model.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"
. "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")/launch.sh"

model=Qwen/Qwen-7B
output=output_qwen
deepspeed=ds_config_zero3.json

# An optimizer step takes GPUs x per_device_train_batch_size x gradient_accumulation_steps conversations. Short of memory:
# --deepspeed ds_config_zero3_offload.json keeps weights and optimizer in main memory.
hyperparameters=(
    --bf16 True
    --num_train_epochs 5
    --per_device_train_batch_size 1
    --gradient_accumulation_steps 16
    --learning_rate 1e-5
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
launch_torchrun "$@"

#!/usr/bin/env bash
# LoRA fine-tuning of a 16-bit Qwen model on several GPUs, of one machine or several (docs/several_machines.md), with
# DeepSpeed ZeRO-2. Each GPU holds the whole model in 16 bit (2 bytes a parameter: 7B 15 GB, 14B 28 GB), the adapters, and
# the activations of its own conversations; the optimizer's state is split. A model too large for that (72B) goes with
# --deepspeed ds_config_zero3.json, which splits the weights, too. The output folder is an adapter: try it with
# `python -m finetune.ask OUTPUT`, make a model of it that stands alone with `python -m finetune.merge OUTPUT MERGED`.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"
. "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")/launch.sh"

model=Qwen/Qwen-7B
output=output_qwen
deepspeed=ds_config_zero2.json

# An optimizer step takes GPUs x per_device_train_batch_size x gradient_accumulation_steps conversations.
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
launch_torchrun "$@"

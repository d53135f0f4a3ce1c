#!/usr/bin/env bash
# Q-LoRA: LoRA over a quantized Qwen model, on several GPUs, of one machine or several (docs/several_machines.md), with
# DeepSpeed ZeRO-2. Each GPU holds the whole quantized model (Int4, with its 16-bit embeddings: 7B 6 GB, 14B 10 GB, 72B
# 42 GB), the adapters, and the activations of its own conversations. ZeRO-3 cannot split quantized weights.
# The output folder is an adapter: try it with `python -m finetune.ask OUTPUT`.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"
. "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")/launch.sh"

model=Qwen/Qwen-7B-Chat-Int4
output=output_qwen
deepspeed=ds_config_zero2.json

# An optimizer step takes GPUs x per_device_train_batch_size x gradient_accumulation_steps conversations.
# --bf16 where the GPU has it (since Ampere), else fp16, as the published script had it: --fp16 asks for that.
hyperparameters=(
    --use_lora True
    --q_lora True
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

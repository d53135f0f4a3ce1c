#!/usr/bin/env bash
# Q-LoRA: LoRA over a quantized Qwen model in one process: on one GPU, or, slowly, on the CPU. Needs no DeepSpeed.
# The GPU holds the quantized model (Int4, with its 16-bit embeddings: 1.8B 2 GB, 7B 6 GB, 14B 10 GB, 72B 42 GB), the
# adapters, and activations. The output folder is an adapter: try it with `python -m finetune.ask OUTPUT`.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"
. "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")/launch.sh"

model=Qwen/Qwen-7B-Chat-Int4
output=output_qwen

# An optimizer step takes per_device_train_batch_size x gradient_accumulation_steps conversations.
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
launch_single_process "$@"

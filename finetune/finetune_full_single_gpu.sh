#!/usr/bin/env bash
# Full-parameter fine-tuning in one process: on one GPU, or, slowly and in float32, on the CPU.
# All parameters train, at 6 bytes each: 2 for the weight, held in bfloat16 and rounded stochastically, so that small
# updates are not lost; 2 for its gradient; 2 for the two moments of an 8-bit AdamW (torchao). 1.8B needs about 11 GB and
# 7B about 46 GB, plus the activations (a few GB). The output folder is a whole model.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"
. "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")/launch.sh"

model=Qwen/Qwen-7B
output=output_qwen

# An optimizer step takes per_device_train_batch_size x gradient_accumulation_steps conversations. Where memory allows 18
# bytes a parameter, `--bf16_weights False --optim adamw_torch` trains float32 weights.
hyperparameters=(
    --bf16 True
    --bf16_weights True
    --optim adamw_torch_8bit
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
launch_single_process "$@"

#!/usr/bin/env bash
# From a bare machine to a fine-tuned model, in a few minutes on a CPU: bash quickstart.sh
#
# Makes .venv, makes a small Qwen base model (real vocabulary, 19.5 million parameters) and trains it for a minute on
# data/conversations.json; then the main job: LoRA on data/example.json, the same questions before and after, merging, and the
# merged model's answers. Everything it makes lies in quickstart/; a second run starts from what is there, and
# `rm -r quickstart` begins anew.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"
case ${1:-} in
    "") ;;
    -h|--help) sed -n -e 1d -e '/^#/!q' -e 's/^# \{0,1\}//p' "$0"; exit ;;
    *) printf 'error: quickstart.sh takes no arguments: %s\n' "$*" >&2; exit 2 ;;
esac
set -euo pipefail
cd -- "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")"

step() { printf '\n== %s\n' "$1"; }
ask() { "$python" -m finetune.ask "$1" --questions_file data/questions.json --max_new_tokens 48; }

bash setup_env.sh
python=${FINETUNE_PYTHON:-.venv/bin/python}
demo=quickstart
mkdir -p "$demo"

step "1/6  a small Qwen base model, trained from scratch for a minute"
if [[ -f $demo/base/config.json ]]; then
    echo "$demo/base is there from an earlier run"
else
    rm -rf "$demo/random"
    "$python" -m qwen_model.new_checkpoint "$demo/random" --layers 4 2>"$demo/errors.txt" || { cat "$demo/errors.txt"; exit 1; }
    # one process on whatever is there; full-parameter, because nothing has been learnt yet that could be kept
    "$python" finetune.py -m "$demo/random" -d data/conversations.json -o "$demo/base" --overwrite_output_dir \
        --model_max_length 256 --per_device_train_batch_size 8 --max_steps 400 --learning_rate 5e-3 \
        --lr_scheduler_type cosine --warmup_ratio 0.03 --adam_beta2 0.95 --save_strategy no
fi

step "2/6  what it answers before"
ask "$demo/base" | tee "$demo/before.txt"

step "3/6  the main job: LoRA on data/example.json"
if [[ -f $demo/adapter/adapter_config.json ]]; then
    echo "$demo/adapter is there from an earlier run"
else
    # higher rate and more epochs than in the script: this model is tiny, and there are 44 samples
    bash finetune/finetune_lora_single_gpu.sh -m "$demo/base" -d data/example.json -o "$demo/adapter" --overwrite_output_dir \
        --num_train_epochs 40 --learning_rate 2e-3 --gradient_accumulation_steps 4 --save_strategy no
fi

step "4/6  what it answers after"
ask "$demo/adapter" | tee "$demo/after.txt"
if cmp -s "$demo/before.txt" "$demo/after.txt"; then
    echo "error: the answers did not change" >&2
    exit 1
fi

step "5/6  merging the adapter into its base"
if [[ -f $demo/merged/config.json ]]; then
    echo "$demo/merged is there from an earlier run"
else
    "$python" -m finetune.merge "$demo/adapter" "$demo/merged"
fi

step "6/6  the merged model, by itself"
ask "$demo/merged" | tee "$demo/merged.txt"
cmp "$demo/after.txt" "$demo/merged.txt"

cat <<END

The adapter's and the merged model's answers are the same. The loss curve is $demo/adapter/loss.png.

With your own model and data (the format: data/README.md):

  bash finetune/finetune_lora_single_gpu.sh -m YOUR_MODEL -d YOUR_DATA.json -o YOUR_OUTPUT
  $python -m finetune.ask YOUR_OUTPUT
  $python -m finetune.merge YOUR_OUTPUT YOUR_MODEL_MERGED
END

# Sourced by the scripts in this folder. Each sets model, output and the array hyperparameters, then calls one of
#   launch_single_process "$@"      one process on one GPU
#   launch_torchrun "$@"            one process per GPU, on one machine or several; these scripts set deepspeed as well
# Options, the choice of Python and of the GPUs, and quoting are here, once. Nothing changes the folder, so a user's
# paths mean what they mean where the user is. Standard output carries only what was asked for (-h, DRY_RUN).
set -eo pipefail
script=$(readlink -f -- "$0")
root=$(cd -- "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")/.." && pwd)
data=()         # files of conversations
extra=()        # the user's flags for finetune.py
started=$(printf '%q ' bash "$0" "$@")  # this script, as it was started
environment=()  # NAME=VALUE of what will run
command=()      # its words
needed=(torch transformers accelerate peft tiktoken)  # packages
wrong=0         # how many errors were found
. "$root/finetune/launch_torchrun.sh"

note() { printf 'note: %s\n' "$1" >&2; }

complain() {
    printf 'error: %s\n' "$1" >&2
    wrong=$((wrong + 1))
}

fail() {
    complain "$1"
    exit 2
}

# One flag a line.
list_hyperparameters() {
    local word
    for word in "${hyperparameters[@]}"; do
        if [[ $word == --* ]]; then printf '\n  %s' "$word"; else printf ' %s' "$word"; fi
    done
}

# The head comment of the script, its options, and its hyperparameters as they stand in the script.
usage() {
    sed -n -e 1d -e '/^#/!q' -e 's/^# \{0,1\}//p' "$script"
    cat <<HELP

Usage: bash $0 [-m MODEL] [-d DATA] [-o OUTPUT] [any flag of finetune.py ...]

  -m, --model MODEL     a checkpoint folder, or a name on the Hugging Face hub (default: $model)
  -d, --data DATA ...   the conversations to learn: files or folders (data/README.md); DATA:0.3 takes a share of a file
  -o, --output OUTPUT   the folder for the result (default: $output)
  --dry_run             look before the run: what is odd about the data, what is learned, steps, memory, disk, time
  -h, --help            this text; the flags of finetune.py are listed by: bash $0 -- --help$([[ ! -v deepspeed ]] || usage_of_torchrun)

Every other flag goes to finetune.py as it is, and so does everything after --. The script's own hyperparameters are
$(list_hyperparameters)

A flag that you give overrides them: --learning_rate 1e-4, --num_train_epochs 3, --fp16 (instead of --bf16).

Environment:
$([[ -v deepspeed ]] && environment_of_torchrun || echo "  CUDA_VISIBLE_DEVICES=2    the GPU to use")
  DRY_RUN=1                 print the command and run nothing (--dry_run looks at the run)
  FINETUNE_PYTHON=PYTHON    the Python to use, instead of the one in .venv
HELP
}

# need_value OPTION [NEXT WORD]: a path that begins with a dash is written ./-path.
need_value() {
    [[ -n ${2:-} && $2 != -* ]] || fail "$1 needs a value"
}

parse_options() {
    while (($#)); do
        case $1 in
            -h|--help) usage; exit 0 ;;
            -m|--model|--model_name_or_path) need_value "$1" "${2:-}"; model=$2 chosen_model=1; shift 2 ;;
            -d|--data|--data_path)
                need_value "$1" "${2:-}"
                shift
                while (($#)) && [[ $1 != -* ]]; do data+=("$1"); shift; done ;;
            -o|--output|--output_dir) need_value "$1" "${2:-}"; output=$2; shift 2 ;;
            --model=*|--model_name_or_path=*) need_value "${1%%=*}" "${1#*=}"; model=${1#*=} chosen_model=1; shift ;;
            --data=*|--data_path=*) need_value "${1%%=*}" "${1#*=}"; data+=("${1#*=}"); shift ;;
            --output=*|--output_dir=*) need_value "${1%%=*}" "${1#*=}"; output=${1#*=}; shift ;;
            --deepspeed=*|--max_restarts=*) own_or_extra "${1%%=*}" "${1#*=}" "$1"; shift ;;
            --deepspeed|--max_restarts)
                if [[ -v deepspeed ]]; then need_value "$1" "${2:-}"; own_or_extra "$1" "$2"; shift; else extra+=("$1"); fi
                shift ;;
            --) shift; extra+=("$@"); break ;;
            *) extra+=("$1"); shift ;;
        esac
    done
    [[ -v chosen_model ]] || note "no -m: $model is taken"
}

# own_or_extra OPTION VALUE [WORD]: the options of launch_torchrun; with launch_single_process they are no options.
own_or_extra() {
    if [[ ! -v deepspeed ]]; then extra+=("$3"); return; fi
    need_value "$1" "$2"
    if [[ $1 == --deepspeed ]]; then chosen_deepspeed=$2; else max_restarts=$2; fi
}

# Whether the user switched a flag on: --flag, --flag True or --flag=True.
switched_on() {
    local i
    for i in "${!extra[@]}"; do
        [[ ${extra[i]} == "$1" && ${extra[i+1]} != [Ff]alse || ${extra[i]} == "$1"=[Tt]rue ]] && return
    done
    return 1
}

# The two precisions exclude each other, so asking for one takes back the script's other.
settle_precision() {
    if switched_on --fp16; then without_bf16; fi
    if switched_on --bf16; then hyperparameters+=(--fp16 False); fi
}

# Prints how many NVIDIA GPUs this machine or container has. A container may have them without nvidia-smi: then the
# device files count. torch would know as well, but takes seconds to import.
count_gpus() {
    local listing devices
    if command -v nvidia-smi >/dev/null; then
        if listing=$(nvidia-smi -L 2>&1); then
            grep -c '^GPU ' <<<"$listing" || true
        else
            note "nvidia-smi finds no GPU: ${listing%%$'\n'*}"
            echo 0
        fi
    else
        devices=(/dev/nvidia[0-9]*)
        # /dev/kfd is AMD's, /dev/dxg that of Windows' subsystem: how many GPUs are behind them, torch will see
        if [[ -e ${devices[0]} ]]; then echo "${#devices[@]}"; elif [[ -e /dev/kfd || -e /dev/dxg ]]; then echo 1; else echo 0; fi
    fi
}

# on_the_cpu WHY [WHAT]: bf16 and fp16 are what GPUs are fast in; most CPUs take ten times as long with them as with float32.
on_the_cpu() {
    local precision=" in float32"
    if [[ " ${extra[*]} " == *" --gpu_memory"* ]]; then  # a look at a run on a GPU that is not here
        note "$1: planning for the GPU of --gpu_memory"
        return
    fi
    if switched_on --bf16 || switched_on --fp16; then precision=""; else without_bf16 --fp16 False; fi
    note "$1: ${2:-running} on the CPU$precision"
}

# without_bf16 FLAG...: takes back what the script wants of bf16. Weights kept in bfloat16 (--bf16_weights) go with passes in
# bf16, and spare memory that only GPUs are short of.
without_bf16() {
    hyperparameters+=(--bf16 False "$@")
    if [[ " ${hyperparameters[*]} " == *" --bf16_weights "* ]] && ! switched_on --bf16_weights; then
        hyperparameters+=(--bf16_weights False --optim adamw_torch)
        note "without bf16, weights and AdamW's moments are in float32: 16 bytes a parameter instead of 6, in fp16 2 more"
    fi
}

# GPUs before Ampere (compute capability 8) have no bf16: there the script's own choice becomes fp16.
fp16_on_older_gpus() {
    local capability
    capability=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader -i "${1:-0}" 2>/dev/null) || return 0
    [[ $capability =~ ^[1-7]\.[0-9]+$ ]] || return 0
    if switched_on --bf16 || switched_on --fp16; then return 0; fi
    without_bf16 --fp16 True
    note "this GPU (compute capability $capability) has no bf16: training in fp16"
}

# Puts exactly one GPU before the process (with several, transformers would spread each batch over all of them in
# threads), and says which, or that the CPU is used.
choose_gpu() {
    local count
    chosen=${CUDA_VISIBLE_DEVICES%%,*}
    count=$(count_gpus)
    gpus=$count
    if [[ ! ${CUDA_VISIBLE_DEVICES+given} ]]; then
        if ((count > 1)); then
            note "$count GPUs here, and one process uses one of them: GPU 0. For another one: CUDA_VISIBLE_DEVICES=1"
            environment+=(CUDA_VISIBLE_DEVICES=0)
        elif ((count == 1)); then
            note "running on the GPU"
        else
            on_the_cpu "no NVIDIA GPU here"
        fi
        return
    fi
    environment+=(CUDA_VISIBLE_DEVICES="$chosen")
    case $chosen in
        ''|-*|NoDevFiles)
            on_the_cpu "CUDA_VISIBLE_DEVICES=$CUDA_VISIBLE_DEVICES hides every GPU"
            return ;;
    esac
    if ((count == 0)); then
        on_the_cpu "CUDA_VISIBLE_DEVICES=$CUDA_VISIBLE_DEVICES is set, but there is no NVIDIA GPU here"
    elif [[ $chosen =~ ^[0-9]+$ ]] && ((10#$chosen >= count)); then
        fail "CUDA_VISIBLE_DEVICES=$CUDA_VISIBLE_DEVICES: no GPU $chosen here - the GPUs are \
0 to $((count - 1)), see nvidia-smi"
    elif [[ $chosen != "$CUDA_VISIBLE_DEVICES" ]]; then
        note "running on GPU $chosen, the first of CUDA_VISIBLE_DEVICES=$CUDA_VISIBLE_DEVICES: one process uses one GPU"
    else
        note "running on GPU $chosen (CUDA_VISIBLE_DEVICES)"
    fi
}

# FINETUNE_PYTHON if it is set, else .venv's (setup_env.sh makes it), else python3.
choose_python() {
    if [[ -n ${FINETUNE_PYTHON:-} ]]; then
        python=$FINETUNE_PYTHON
    elif [[ -x $root/.venv/bin/python ]]; then
        python=$root/.venv/bin/python
    else
        python=python3
    fi
}

# Fails where the chosen Python cannot do the job. Looks without importing: that would take seconds.
check_python() {
    local missing
    command -v -- "$python" >/dev/null ||
        fail "no program $python - bash $(printf %q "$root/setup_env.sh") makes an environment with all that is needed"
    missing=$("$python" -c '
import sys
from importlib.util import find_spec
print(*[name for name in sys.argv[1:] if find_spec(name) is None], sep=", ")' "${needed[@]}")
    [[ -z $missing ]] ||
        fail "$python has no $missing - bash $(printf %q "$root/setup_env.sh") makes an environment with all that is \
needed; FINETUNE_PYTHON=PYTHON names another Python"
}

# Under DRY_RUN the command on standard output, quoted for pasting into bash; else the command itself, in this very
# process, so that signals and the exit code are its own.
run_or_show() {
    if [[ ${DRY_RUN:-0} != 0 ]]; then
        local words
        words=$(printf ' %q' "${environment[@]}" "${command[@]}")
        printf '%s\n' "${words:1}"
        return
    fi
    check_python
    export FINETUNE_COMMAND="${started% }"  # for training.json
    ((${#environment[@]} == 0)) || export "${environment[@]}"
    exec "${command[@]}"
}

# What finetune.py is given. It reports a missing --data_path itself, together with all its other findings.
add_trainer() {
    command+=("$root/finetune.py" --model_name_or_path "$model")
    if ((${#data[@]})); then command+=(--data_path "${data[@]}"); fi
    command+=(--output_dir "$output" "${hyperparameters[@]}" "${extra[@]}")
}

launch_single_process() {
    parse_options "$@"
    settle_precision
    choose_gpu
    if ((gpus)); then fp16_on_older_gpus "$chosen"; fi
    choose_python
    command+=("$python")
    add_trainer
    run_or_show
}

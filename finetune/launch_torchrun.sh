# Sourced by launch.sh: what launch_torchrun adds to it, one process per GPU, on one machine or several.
# NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT and GPUS_PER_NODE are those of the published scripts.

usage_of_torchrun() {
    cat <<HELP

      --deepspeed CONFIG  a DeepSpeed config: a file of yours, or one of ours by its name (default: $deepspeed):
                        $(cd -- "$root/finetune" && echo ds_config_*.json)
                        none: plain data parallelism (DDP), without DeepSpeed
      --max_restarts N  how often to start the processes again when one of them dies (default: $max_restarts); they go on
                        from the newest complete checkpoint with --resume_from_checkpoint auto
HELP
}

environment_of_torchrun() {
    cat <<HELP
  CUDA_VISIBLE_DEVICES=0,1  the GPUs to use, one process each
  GPUS_PER_NODE=4           processes on this machine (default: one per GPU; without a GPU one, on the CPU)
  NNODES=2                  how many machines (default: 1); the script is started on each of them, with
  NODE_RANK=0               the number of this machine, from 0
  MASTER_ADDR=10.0.0.1      the address of machine 0
  MASTER_PORT=6001          a free port on machine 0 (default: 6001; on one machine any that is free)
  MASTER_TIMEOUT=600        seconds to wait for the other machines (default: 600)
HELP
}

# The GPUs for one process each: CUDA_VISIBLE_DEVICES or all, of them GPUS_PER_NODE. On the CPU, GPUS_PER_NODE or one.
choose_gpus() {
    local count number visible=() why=""
    count=$(count_gpus)
    if [[ ${CUDA_VISIBLE_DEVICES+given} ]]; then
        environment+=(CUDA_VISIBLE_DEVICES="$CUDA_VISIBLE_DEVICES")
        IFS=, read -ra visible <<<"$CUDA_VISIBLE_DEVICES"
        if ((count == 0)); then
            why="CUDA_VISIBLE_DEVICES=$CUDA_VISIBLE_DEVICES is set, but there is no NVIDIA GPU here"
        elif [[ -z $CUDA_VISIBLE_DEVICES || $CUDA_VISIBLE_DEVICES == -* || $CUDA_VISIBLE_DEVICES == NoDevFiles ]]; then
            why="CUDA_VISIBLE_DEVICES=$CUDA_VISIBLE_DEVICES hides every GPU"
        fi
        for number in "${visible[@]}"; do
            [[ -z $why && $number =~ ^[0-9]+$ ]] && ((10#$number >= count)) && complain "CUDA_VISIBLE_DEVICES=\
$CUDA_VISIBLE_DEVICES: no GPU $number here - the GPUs are 0 to $((count - 1)), see nvidia-smi"
        done
        gpus=${#visible[@]}
        chosen=${visible[0]:-0}
    else
        gpus=$count chosen=0
        ((count)) || why="no NVIDIA GPU here"
    fi
    if [[ -n $why ]]; then gpus=0; fi
    processes=${GPUS_PER_NODE:-$((gpus ? gpus : 1))}
    if ((gpus && processes > gpus)); then
        complain "GPUS_PER_NODE=$processes, but $gpus visible - give at most $gpus, or leave it out"
    fi
    local what="running $processes process$( ((processes == 1)) || echo es)"
    if ((gpus)); then note "$what, one per GPU"; else on_the_cpu "$why" "$what"; fi
}

# check_number NAME LOW HIGH [LABEL]: a variable that is a whole number, if it is set. It is left without leading zeros.
check_number() {
    local value=${!1:-}
    [[ -n $value ]] || return 0
    if [[ $value =~ ^[0-9]{1,9}$ ]] && ((10#$value >= $2 && 10#$value <= $3)); then
        printf -v "$1" %d "$((10#$value))"
    else
        complain "${4:-$1=}$value: not possible - give a whole number from $2 to $3"
        return 1
    fi
}

# The machines, as the environment names them. Everything wrong is said, before anything is started or waited for.
check_machines() {
    check_number GPUS_PER_NODE 1 1024 || unset GPUS_PER_NODE
    check_number MASTER_TIMEOUT 1 999999 || true
    check_number max_restarts 0 1000000 '--max_restarts ' || true
    check_number NNODES 1 100000 || return 0
    nnodes=${NNODES:-1}
    check_number MASTER_PORT "$((nnodes > 1))" 65535 || true
    if [[ -z ${NODE_RANK:-} ]]; then
        ((nnodes == 1)) || complain "NNODES=$nnodes, but NODE_RANK is not set - give 0 on the machine of MASTER_ADDR, \
and 1 to $((nnodes - 1)) on the others"
    elif ! [[ $NODE_RANK =~ ^[0-9]{1,9}$ ]] || ((10#$NODE_RANK >= nnodes)); then
        complain "NODE_RANK=$NODE_RANK: not in 0..$((nnodes - 1)) - number the machines from 0; NNODES=$nnodes is how \
many there are"
    else
        NODE_RANK=$((10#$NODE_RANK))
    fi
    ((nnodes > 1)) || return 0
    case ${MASTER_ADDR:-localhost} in
        localhost|localhost.*|ip6-localhost|127.*|::1|::|0.0.0.0)
            complain "NNODES=$nnodes, but MASTER_ADDR is ${MASTER_ADDR:-not set} - give the address of the machine with \
NODE_RANK=0, as the others reach it" ;;
    esac
}

# Whether the user asks for FSDP: the last --fsdp counts, and nothing or False behind it means no.
wants_fsdp() {
    local i value=false
    for i in "${!extra[@]}"; do
        case ${extra[i]} in
            --fsdp=*) value=${extra[i]#*=} ;;
            --fsdp) value=${extra[i+1]-true}; if [[ $value == --* ]]; then value=true; fi ;;
        esac
    done
    value=${value// /}
    [[ ! ${value,,} =~ ^(false|none|no|0|)$ ]]
}

# The DeepSpeed config: the user's file, or ours of that name.
find_deepspeed() {
    local wish=${chosen_deepspeed:-$deepspeed}
    if [[ -z $chosen_deepspeed ]] && wants_fsdp; then wish=none; fi # the user's engine wins over the script's
    if [[ $wish == none ]]; then return; fi
    if [[ -n $chosen_deepspeed && -f $wish ]]; then
        config=$wish
    elif [[ $wish != */* && -f $root/finetune/$wish ]]; then
        config=$root/finetune/$wish
    else
        complain "DeepSpeed config $wish not found in $PWD - give a file, none, or one of ours: \
$(cd -- "$root/finetune" && echo ds_config_*.json)"
    fi
    needed+=(deepspeed)
}

launch_torchrun() {
    chosen_deepspeed="" max_restarts=0 config="" nnodes=1
    parse_options "$@"
    settle_precision
    check_machines
    choose_gpus
    find_deepspeed
    ((wrong == 0)) || exit 2
    if ((gpus)); then fp16_on_older_gpus "$chosen"; fi
    choose_python
    command+=("$python" "$root/finetune/distributed/torchrun.py" --nproc_per_node "$processes" --max_restarts "$max_restarts")
    if ((nnodes > 1)); then
        command+=(--nnodes "$nnodes" --node_rank "$NODE_RANK" --master_addr "$MASTER_ADDR" --master_port "${MASTER_PORT:-6001}")
    elif [[ -n ${MASTER_PORT:-} ]]; then
        command+=(--master_port "$MASTER_PORT")
    fi
    if [[ -n ${MASTER_TIMEOUT:-} ]]; then command+=(--master_timeout "$MASTER_TIMEOUT"); fi
    if [[ -n $config ]]; then hyperparameters+=(--deepspeed "$config"); fi
    add_trainer
    run_or_show
}

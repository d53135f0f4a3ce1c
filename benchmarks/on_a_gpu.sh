#!/usr/bin/env bash
# Everything that only a GPU can show, in one command, what is worth most first. One part's failure does not end the others:
#
#   bash benchmarks/on_a_gpu.sh                        # all of it: some hours, and the README's tables are full
#   bash benchmarks/on_a_gpu.sh cells profile          # some parts: tests, cells, profile, cache
#   MINUTES=9 bash benchmarks/on_a_gpu.sh              # what goes into nine minutes; cells that a file has are not measured again
#
# MINUTES (for all parts together, 600); SIZES ("7B 1.8B"; tiny, on a CPU too), METHODS (all), LENGTHS (the published six), WAYS (trainers: all), STEPS
# (timed ones of a cell, 5); CHECKPOINTS: a folder for random weights (7B: 15 GB), kept for the next call - else made anew and deleted;
# RESULTS: where files of figures go (benchmarks/results), LOGS: where each part's output goes, too (benchmarks/logs);
# FINETUNE_PYTHON: an interpreter that has everything; DRY_RUN=1 shows the commands.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"
set -o pipefail
cd -- "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")/.." || exit 1
case ${1:-} in -h | --help) sed -n -e 1d -e '/^#/!q' -e 's/^# \{0,1\}//p' "$0"; exit ;; esac
fail() { printf 'error: %s\n' "$1" >&2; exit 2; }
(($#)) || set -- tests cells profile cache
for name in "$@"; do
    case $name in tests | cells | profile | cache) ;; *) fail "$name: unknown part - give tests, cells, profile or cache" ;; esac
done
[[ ${MINUTES:-600} =~ ^[0-9]+$ ]] || fail "MINUTES=$MINUTES: give a whole number"
if [ -z "${DRY_RUN:-}" ] && [ "${SIZES:-}" != tiny ] && ! compgen -G '/dev/nvidia[0-9]*' >/dev/null && ! [ -e /dev/kfd ]; then
    fail "no GPU on this machine - SIZES=tiny runs on a CPU, DRY_RUN=1 shows the commands"
fi
python=$(bash setup_env.sh) || exit
read -ra sizes <<<"${SIZES:-7B 1.8B}"
read -ra methods <<<"${METHODS:-lora qlora_gptq full qlora_nf4 full_bf16 lora_emb}"
read -ra lengths <<<"${LENGTHS:-2048 512 4096 256 8192 1024}"
read -ra ways <<<"${WAYS:-ours transformers liger trl}"
results=${RESULTS:-benchmarks/results} logs=${LOGS:-benchmarks/logs}
ends=$((SECONDS + 60 * ${MINUTES:-600}))
failed=()
if [ -n "${CHECKPOINTS:-}" ]; then
    checkpoints=$CHECKPOINTS
else
    checkpoints=$(mktemp -d) || exit
    trap 'rm -rf "$checkpoints"' EXIT
fi

# part NAME COMMAND...: within the minutes that are left, shown and kept. Who is out of time is asked to end, and 10 s later made to.
part() {
    local name=$1 started=$SECONDS code=0
    shift
    if [ -n "${DRY_RUN:-}" ]; then
        printf '%s: %s\n' "$name" "$*"
        return
    fi
    if ((ends - started < 10)); then
        printf '\n== %s: no time is left\n' "$name"
        failed+=("$name")
        return
    fi
    printf '\n== %s: %s\n' "$name" "$*"
    mkdir -p "$logs"
    timeout --kill-after=10 "$((ends - started))" "$@" 2>&1 | tee "$logs/$name.log" || code=$?
    printf '== %s: exit code %d after %d s\n' "$name" "$code" "$((SECONDS - started))"
    ((code == 0)) || failed+=("$name")
}

tests() { part tests "$python" -m pytest -q -m gpu tests; }
cells() {
    part cells "$python" benchmarks/train.py --sizes "${sizes[@]}" --methods "${methods[@]}" --lengths "${lengths[@]}" \
        --ways "${ways[@]}" --steps "${STEPS:-5}" --missing --checkpoints "$checkpoints" --save "$results"
    ends=$((ends + 60)) # the tables are made in any case
    [ -n "${RESULTS:-}" ] || part table "$python" benchmarks/table.py
    ends=$((ends - 60))
}
profile() {
    part profile "$python" benchmarks/step_profile.py --size "${sizes[0]}" --length 2048 --checkpoints "$checkpoints" \
        --json "$logs/profile.json"
}
cache() { part cache "$python" benchmarks/kv_cache.py --timed 64 --save "$results"; }

for name in "$@"; do "$name"; done
((${#failed[@]} == 0)) || printf '\nnot to the end: %s - see %s\n' "${failed[*]}" "$logs"
exit "${#failed[@]}"

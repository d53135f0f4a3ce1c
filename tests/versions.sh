#!/usr/bin/env bash
# Runs the tests of what depends on transformers under the oldest, the pinned and the newest versions, and prints a table:
#
#   bash tests/versions.sh                            # all of it, about 40 minutes on two cores
#   bash tests/versions.sh --saved_folder             # only what a saved folder answers by itself, minutes
#   bash tests/versions.sh oldest newest              # these rows
#
# oldest: the oldest transformers that the code says it works with; newest: whatever pip offers today of transformers and of what it
# is used with. Both lie over .venv (everything else is the pinned version's), in .venv/versions/, and are made when they are needed.
# Each part's output goes to .venv/versions/NAME.PART.log. Exit code 1 where a part failed.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"
set -euo pipefail
shopt -s inherit_errexit # also within $(...)
cd -- "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")/.."
rows=() parts_wanted=all
for word in "$@"; do
    case $word in
        --saved_folder) parts_wanted=none ;;
        oldest | pinned | newest) rows+=("$word") ;;
        -h | --help) sed -n '2,11s/^# \{0,1\}//p' "$0"; exit ;;
        *) printf 'error: %s: give oldest, pinned, newest or --saved_folder\n' "$word" >&2; exit 2 ;;
    esac
done
((${#rows[@]})) || rows=(oldest pinned newest)
pinned=$(bash setup_env.sh)
pinned=$(readlink -f "$(dirname "$pinned")")/$(basename "$pinned")
place=$PWD/.venv/versions
oldest=$(sed -n 's/^OLDEST, NEWEST = "\([0-9.]*\)".*/\1/p' qwen_model/versions.py)
mkdir -p "$place"
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 MPLBACKEND=Agg

declare -A packages=(
    [oldest]="transformers==$oldest"
    [newest]="--upgrade transformers peft accelerate tiktoken safetensors tokenizers"
)
declare -A parts=(
    [model]="tests/qwen_model tests/compat"
    [trainer]="tests/flags tests/steps tests/lifecycle tests/memory tests/model tests/lora tests/folders tests/writing tests/test_finetune.py"
    [merging]="tests/merge tests/test_refresh.py"
)
order=(model trainer merging) failed=0
[ "$parts_wanted" = all ] || order=()

# python_of ROW: the Python of that row, made if need be. pip installs over the pinned packages only what differs.
python_of() {
    local venv=$place/$1
    [ "$1" = pinned ] && { printf '%s\n' "$pinned"; return; }
    if [ ! -f "$venv/made" ] || [ "$1" = newest ] || [ "$(cat "$venv/made")" != "${packages[$1]}" ]; then
        "$pinned" -m venv --clear "$venv" >&2
        "$pinned" -c 'import site; print(site.getsitepackages()[0])' >"$("$venv/bin/python" -c 'import site; print(site.getsitepackages()[0])')/pinned.pth"
        # torch stays: another one would bring gigabytes
        "$pinned" -c 'import torch; print("torch==" + torch.__version__.split("+")[0])' >"$place/constraints.txt"
        # shellcheck disable=SC2086  # words
        "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -c "$place/constraints.txt" ${packages[$1]} >&2
        if [ "$1" = oldest ] && [[ "$(versions_of "$venv/bin/python")" != "transformers $oldest,"* ]]; then
            printf 'error: transformers %s was not installed into %s\n' "$oldest" "$venv" >&2
            return 1
        fi
        printf '%s' "${packages[$1]}" >"$venv/made"
    fi
    printf '%s\n' "$venv/bin/python"
}

versions_of() {
    "$1" -c 'import importlib.metadata as m; print(", ".join(f"{p} {m.version(p)}" for p in ("transformers", "peft", "accelerate")))'
}

# part LOG COMMAND...: prints "ok" or "FAILED"; what the command says goes to the log
part() {
    local log=$1
    shift
    if "$@" >"$log" 2>&1; then printf 'ok'; else printf 'FAILED'; fi
}

folder=$place/saved_folder
rm -rf "$folder"
"$pinned" tests/saved_folder.py make "$folder" >"$place/make.log" 2>&1 || { cat "$place/make.log" >&2; exit 1; }
(cd "$place" && "$pinned" "$OLDPWD/tests/saved_folder.py" answer "$folder" >"$place/pinned.answers" 2>"$place/pinned.saved.log") ||
    { cat "$place/pinned.saved.log" >&2; exit 1; }

printf '%-7s  %-52s  %-12s' row versions 'saved folder'
((${#order[@]} == 0)) || printf '  %-8s' "${order[@]}"
printf '\n'
for row in "${rows[@]}"; do
    python=$(python_of "$row")
    result=$(part "$place/$row.saved.log" bash -c 'cd "$0" && HF_MODULES_CACHE="$0/modules.$4" "$1" "$2" answer "$3" >"$0/$4.answers" && cmp "$0/pinned.answers" "$0/$4.answers"' \
        "$place" "$python" "$PWD/tests/saved_folder.py" "$folder" "$row")
    printf '%-7s  %-52s  %-12s' "$row" "$(versions_of "$python")" "$result"
    [ "$result" = ok ] || failed=1
    for name in ${order[@]+"${order[@]}"}; do
        # shellcheck disable=SC2086  # paths
        result=$(part "$place/$row.$name.log" "$python" -m pytest -q -p no:cacheprovider -m "not slow and not gpu" ${parts[$name]})
        printf '  %-8s' "$result"
        [ "$result" = ok ] || failed=1
    done
    printf '\n'
done
((failed == 0)) || printf '\nsee %s/*.log\n' "$place"
exit "$failed"

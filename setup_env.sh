#!/usr/bin/env bash
# Makes .venv beside this file and installs requirements.txt into it. When that is done already it does nothing; after
# an interruption it goes on; when requirements.txt has changed it installs the changes.
#
#   bash setup_env.sh       standard output: the path of the Python to use, and nothing else
#
# FINETUNE_PYTHON=PYTHON    an interpreter that has everything already (in a container, say): used as it is

# Sourced, it would change the user's shell, and an error would end it: then bash's $0 is not this file, zsh says so, and
# in other shells $0 is the shell.
case ${BASH_SOURCE:-}:${ZSH_EVAL_CONTEXT:-}:$0 in
    "$0"::*|:toplevel:*|::*setup_env.sh) ;;
    *)
        printf 'error: setup_env.sh is to be run, not sourced: bash setup_env.sh; then: source .venv/bin/activate\n' >&2
        return 2 ;;
esac
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"
case ${1:-} in
    "") ;;
    -h|--help) sed -n -e 1d -e '/^#/!q' -e 's/^# \{0,1\}//p' "$0"; exit ;;
    *) printf 'error: setup_env.sh takes no arguments: %s\n' "$*" >&2; exit 2 ;;
esac
set -eo pipefail
root=$(cd -- "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")" && pwd)
venv=$root/.venv
log=$venv/install.log
without_compiler=""  # set where there is none: the packages left out

say() { printf 'setup: %s\n' "$1" >&2; }

fail() {
    printf 'error: %s\n' "$1" >&2
    exit 2
}

# numpy 2.2.6 has wheels up to Python 3.13, transformers 5.24 starts at 3.11.
is_supported() { "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' >/dev/null 2>&1; }

find_base_python() {
    local candidate
    for candidate in python3 python3.13 python3.12 python3.11; do
        if is_supported "$candidate"; then
            "$candidate" -c 'import ensurepip' 2>/dev/null ||
                fail "$candidate has no ensurepip, so it makes no .venv - apt-get install $candidate-venv, then again"
            printf '%s\n' "$candidate"
            return
        fi
    done
    fail "no Python 3.11, 3.12 or 3.13 here (python3 is: $(python3 --version 2>&1 || true)) - install one and its \
venv module, for example: apt-get install python3 python3-venv"
}

make_venv() {
    is_supported "$venv/bin/python" && "$venv/bin/python" -m pip --version >/dev/null 2>&1 && return
    local base
    base=$(find_base_python)
    say "making .venv with $("$base" --version)"
    "$base" -m venv --clear "$venv" >&2 || fail "$base -m venv failed, see above"
}

# gptqmodel needs a package that is compiled on the spot, with the compiler that this Python was built with.
can_compile() {
    "$venv/bin/python" - <<'PYTHON'
import os, shlex, shutil, sys, sysconfig
compiler = shlex.split(os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc")[0]
header = os.path.join(sysconfig.get_paths()["include"], "Python.h")
sys.exit(not (shutil.which(compiler) and os.path.exists(header)))
PYTHON
}

# What can be installed on this machine.
wanted_requirements() {
    grep -v "^${without_compiler:-leave nothing out}==" "$root/requirements.txt"
}

# pip's lines go to the log; a person at a terminal also sees which package it is at.
show_progress() {
    local line
    while IFS= read -r line; do
        printf '%s\n' "$line" >&3
        case $line in
            Collecting*|*Downloading*|Building*|Installing*)
                if [ -t 2 ]; then printf '\r\033[K  %.90s' "$line" >&2; fi ;;
        esac
    done 3>"$log"
    if [ -t 2 ]; then printf '\r\033[K' >&2; fi
}

# Once all is installed, .venv/installed.txt holds what was asked for; the next run compares.
install_requirements() {
    local wanted
    wanted=$(wanted_requirements)
    [ "$wanted" = "$(cat "$venv/installed.txt" 2>/dev/null)" ] && return
    printf '%s\n' "$wanted" >"$venv/wanted.txt"
    [ -z "$without_compiler" ] || say "no C compiler or no Python.h here: $without_compiler is left out, which \
only quantized models need. To have it: apt-get install gcc python3-dev, then bash setup_env.sh"
    say "installing requirements.txt: a few minutes and 3 GB; with CUDA several GB more"
    if ! "$venv/bin/python" -m pip install --disable-pip-version-check --no-input -r "$venv/wanted.txt" 2>&1 |
        show_progress; then
        tail -n 12 "$log" >&2
        fail "the installation stopped; pip's last lines are above, all of them in $log. The same command goes on."
    fi
    mv "$venv/wanted.txt" "$venv/installed.txt"
    say "done"
}

if [ -n "${FINETUNE_PYTHON:-}" ]; then
    command -v -- "$FINETUNE_PYTHON" || fail "FINETUNE_PYTHON=$FINETUNE_PYTHON is not a program"
    exit
fi
make_venv
can_compile || without_compiler=gptqmodel
install_requirements
printf '%s\n' "$venv/bin/python"

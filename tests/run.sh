#!/usr/bin/env bash
# Runs the tests that need neither a GPU nor much time, in .venv, which it makes if need be. Arguments go to pytest:
#   bash tests/run.sh -k plan            bash tests/run.sh -m slow
# `pytest --help` has their list; without any, all these tests run on up to four cores.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"
case ${1:-} in -h|--help) sed -n -e 1d -e '/^#/!q' -e 's/^# \{0,1\}//p' "$0"; exit ;; esac
set -e
cd -- "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")/.."
python=$(bash setup_env.sh)

# The tests' models are tiny: more threads cost more than they give, and one makes the numbers the same everywhere.
[[ " $* " == *" -m "* ]] || export OMP_NUM_THREADS=1
export TOKENIZERS_PARALLELISM=false MPLBACKEND=Agg
export HF_HUB_OFFLINE=1 # a test that would fetch something is a mistake
# All of them: on as many cores as there are, four at most, a file on one.
parallel=()
cores=$(env -u OMP_NUM_THREADS nproc) # which would say 1 as well
(($#)) || parallel=(-n "$((cores < 4 ? cores : 4))" --dist loadfile)
exec "$python" -m pytest -q -m "not slow and not gpu" "${parallel[@]}" "$@"

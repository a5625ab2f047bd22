#!/usr/bin/env bash
# What `make test` runs: the tests on a Slurm cluster of this machine, one after the other, beside all others, two at a
# time. The first mostly wait; what they said is printed at the end. Usage: tests/run.sh PYTHON
set -uo pipefail
python=$1 said=$(mktemp) parts=()

start() { # ARGUMENT...: a part of the tests, which ends with this script, however that ends
    setpriv --pdeathsig TERM "$python" -m pytest --durations 25 "$@" </dev/null &
    parts+=($!)
}
trap 'kill -INT "${parts[@]}" 2>/dev/null; wait; rm -f "$said"' EXIT
trap 'exit 130' INT TERM HUP

set -m # without job control, bash has its children ignore Ctrl-C, and so would what the tests start
start tests/slurm -m 'not long' >"$said" 2>&1
start -m 'not slurm and not long' -n 2 --dist loadfile --no-loadscope-reorder
wait "${parts[1]}"
others=$?
echo '== those on a Slurm cluster of this machine'
wait "${parts[0]}"
slurm=$?
cat "$said"
parts=()
exit $((others | slurm))

# shellcheck shell=bash
# What a job's batch shell does around srun, for slurm/train.sh and for the jobs of `qwenlora submit`:
#   job_begin [ENV_FILE]   sources the site's set-up (see slurm/env.sh)
#   job_end CODE           requeues the job, with the same id, when srun left with 75; else leaves with srun's code
# It runs outside of any container, so that it can always ask Slurm.

job_begin() {
    # This shell gets TERM, too, at the time limit and when the job is cancelled; it must outlive srun.
    # (CONT is not trapped: a bash that traps it can lose the signal that came with it.)
    trap job_terminated=1 TERM
    trap : INT USR1 USR2
    job_terminated=
    job_watch_time_limit &
    job_watcher=$!
    QWENLORA_SECRET=$(od -An -N16 -tx1 /dev/urandom | tr -d ' \n') # by which the agents know each other
    export QWENLORA_SECRET
    export QWENLORA_REQUEUES=1 # tells the agent that 75 requeues the job
    # shellcheck disable=SC2034 # env.sh sets them, train.sh uses them
    container=() srun_options=()
    if [[ -n ${1:-} ]]; then
        # shellcheck source=slurm/env.sh
        if ! source "$1"; then
            echo "error: $1 failed; it sets up this site's jobs (see slurm/env.sh)" >&2
            job_stop_watcher
            exit 2
        fi
    fi
    # once a node or an agent is lost, srun's exit code is that of the lost one: the agent that leads leaves its own
    # here, and the nodes to leave out. The first agent makes it a link to a file in the run folder, which all nodes can
    # write
    QWENLORA_EXIT_CODE_FILE=$(mktemp)
    export QWENLORA_EXIT_CODE_FILE
}

# A task of an array is named ARRAY_TASK: the number of the last task is also the whole array's.
job_id() {
    if [[ -n ${SLURM_ARRAY_JOB_ID:-} ]]; then
        echo "${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"
    else
        echo "$SLURM_JOB_ID"
    fi
}

# Prints the job's state, its reason, whether it may be requeued, and how often it was. Nothing without an
# answer.
job_facts() {
    scontrol show job "$(job_id)" 2>/dev/null |
        sed -n 's/^ *JobState=\([A-Z_]*\) Reason=\([^ ]*\) .*/\1 \2/p; s/^ *Requeue=\([01]\) Restarts=\([0-9]*\) .*/\1 \2/p' |
        head -n 2 | tr '\n' ' '
}

# Requeues the job at its time limit. Slurm then sends TERM to everything, and KILL after KillWait: ranks that
# need longer to finish their step take srun and this shell with them, so nobody would be left to requeue.
job_watch_time_limit() {
    trap '[[ $(job_facts) == "COMPLETING TimeLimit 1 "* ]] && scontrol requeue "$(job_id)"; exit' TERM
    trap '' INT USR1 USR2
    trap 'kill $!; exit' ALRM # from job_stop_watcher
    while :; do
        sleep 3600 >&- 2>&- & # without the job's output: who reads that would wait for it to be closed
        wait
    done
}

# By ALRM, since nohup makes shells ignore HUP. More than once, since bash handles a signal that comes just
# before `wait` only when that is over, an hour later.
job_stop_watcher() {
    for _ in {1..50}; do
        kill -ALRM "$job_watcher" 2>/dev/null || break
        sleep 0.1
    done
}

# Requeues a job, which leaves out nodes from then on (job_requeue ID NODES). Slurm takes new nodes to leave out of
# waiting jobs only, and sends TERM to all of this one once it waits.
job_requeue() (
    trap '' TERM
    scontrol requeue "$1" || {
        echo "error: job $1 cannot be requeued; the same sbatch command goes on" >&2
        return
    }
    [[ -n $2 ]] || return
    for _ in {1..10}; do
        scontrol update JobId="$1" ExcNodeList="$2" && return
        sleep 1
    done
)

job_end() {
    local code=$1 id state reason requeue restarts before=${SLURM_RESTART_COUNT:-0} exclude
    id=$(job_id)
    if [[ -s $QWENLORA_EXIT_CODE_FILE ]]; then read -r code exclude <<<"$(<"$QWENLORA_EXIT_CODE_FILE")"; fi
    rm -f "$(readlink -f "$QWENLORA_EXIT_CODE_FILE")" "$QWENLORA_EXIT_CODE_FILE"
    job_stop_watcher
    # over 128: an agent was killed, or was told to stop before it handled signals. That is requeued ten times at most
    if ((code != 75 && (code <= 128 || before >= 10))); then exit "$code"; fi
    for _ in {1..60}; do # slurmctld may be restarting
        read -r state reason requeue restarts <<<"$(job_facts)"
        [[ -n $restarts ]] && break
        sleep 5
    done
    if [[ -z $restarts ]]; then
        echo "error: Slurm does not answer, so job $id is not requeued; the same sbatch command goes on" >&2
    elif ((restarts > before)); then
        : # already requeued, by Slurm or by job_watch_time_limit
    elif [[ $requeue == 0 ]]; then
        echo "stopped, and not requeued: the job forbids it (--no-requeue, or qwenlora cancel); the same command goes on"
    elif [[ $reason != TimeLimit && ($state != RUNNING || -n $job_terminated) ]]; then
        : # cancelled
    else
        echo "requeueing job $id"
        job_requeue "$id" "${exclude:-}"
    fi
    exit "$code"
}

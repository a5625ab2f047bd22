# shellcheck shell=bash
# What the batch shell of a job does around srun, for slurm/train.sh and for jobs that `qwenlora submit` made:
#   job_begin [ENV_FILE]   reads the site's set-up (slurm/env.sh says what may stand there)
#   job_end CODE           runs the job again, with the same id, when srun left with 75; else leaves with its code
# It runs outside of any container, so that it can always ask Slurm.

job_begin() {
    # at the time limit, and when the job is cancelled, this shell is told to end as well: it must outlive srun.
    # (not CONT: a bash that traps it can lose the signal that came with it)
    trap job_told=1 TERM
    trap : INT USR1 USR2
    job_told=
    job_watch &
    job_watcher=$!
    QWENLORA_SECRET=$(od -An -N16 -tx1 /dev/urandom | tr -d ' \n') # by which the agents know each other
    export QWENLORA_SECRET
    export QWENLORA_REQUEUES=1 # the agent may leave with 75 for "run me again"
    # shellcheck disable=SC2034 # for env.sh to fill and train.sh to use
    container=() srun_options=()
    if [[ -n ${1:-} ]]; then
        # shellcheck source=slurm/env.sh
        if ! source "$1"; then
            echo "error: $1 failed; it sets up this site's jobs (slurm/env.sh says how)" >&2
            job_watch_no_more
            exit 2
        fi
    fi
}

# the number of an array's last task is the whole array's, too
job_id() {
    if [[ -n ${SLURM_ARRAY_JOB_ID:-} ]]; then
        echo "${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"
    else
        echo "$SLURM_JOB_ID"
    fi
}

# What Slurm says of the job: state, reason, whether it may be requeued, how often it was. Nothing when it does not answer.
job_facts() {
    scontrol show job "$(job_id)" 2>/dev/null |
        sed -n 's/^ *JobState=\([A-Z_]*\) Reason=\([^ ]*\) .*/\1 \2/p; s/^ *Requeue=\([01]\) Restarts=\([0-9]*\) .*/\1 \2/p' |
        head -n 2 | tr '\n' ' '
}

# At the time limit everything is told to end, and killed KillWait later: ranks that need longer for their step take srun
# and this shell with them. So the job is put back into the queue at once.
job_watch() {
    trap '[[ $(job_facts) == "COMPLETING TimeLimit 1 "* ]] && scontrol requeue "$(job_id)"; exit' TERM
    trap '' INT USR1 USR2
    trap 'kill $!; exit' ALRM # from job_watch_no_more
    while :; do
        sleep 3600 >&- 2>&- & # nobody waits for its output
        wait
    done
}

# By ALRM, since nohup has shells ignore HUP; more than once, since a signal that comes just before bash waits is handled
# when the waiting is over, an hour later.
job_watch_no_more() {
    for _ in {1..50}; do
        kill -ALRM "$job_watcher" 2>/dev/null || break
        sleep 0.1
    done
}

job_end() {
    local code=$1 id state reason requeue restarts before=${SLURM_RESTART_COUNT:-0}
    id=$(job_id)
    job_watch_no_more
    # over 128: an agent was killed, or told to stop before it could listen; not for ever, though
    if ((code != 75 && (code <= 128 || before >= 10))); then exit "$code"; fi
    for _ in {1..60}; do # slurmctld may be starting again
        read -r state reason requeue restarts <<<"$(job_facts)"
        [[ -n $restarts ]] && break
        sleep 5
    done
    if [[ -z $restarts ]]; then
        echo "error: Slurm does not answer, so job $id is not requeued; the same sbatch command goes on" >&2
    elif ((restarts > before)); then
        : # it is requeued already: by Slurm, or by job_watch
    elif [[ $requeue == 0 ]]; then
        echo "stopped, and not requeued: the job may not be (--no-requeue, or qwenlora cancel); the same command goes on"
    elif [[ $reason != TimeLimit && ($state != RUNNING || -n $job_told) ]]; then
        : # cancelled: to be left alone
    else
        echo "requeueing job $id"
        scontrol requeue "$id" || echo "error: job $id cannot be requeued; the same sbatch command goes on" >&2
    fi
    exit "$code"
}

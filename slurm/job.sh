# shellcheck shell=bash
# What the batch shell of a job does around srun, for slurm/train.sh and for jobs that `qwenlora submit` made:
#   job_begin [ENV_FILE]   reads the site's set-up (slurm/env.sh says what may stand there)
#   job_end CODE           runs the job again, with the same id, when srun left with 75; else leaves with its code
# It runs outside of any container, so that it can always ask Slurm.

job_begin() {
    # at the time limit, and when the job is cancelled, this shell is told to end as well: it must outlive srun.
    # (not CONT: a bash that traps it can lose the signal that came with it)
    trap : TERM INT USR1 USR2
    job_watch &
    job_watcher=$!
    export QWENLORA_REQUEUES=1 # the agent may leave with 75 for "run me again"
    # shellcheck disable=SC2034 # for env.sh to fill and train.sh to use
    container=() srun_options=()
    if [[ -n ${1:-} ]]; then
        # shellcheck source=slurm/env.sh
        if ! source "$1"; then
            echo "error: $1 failed; it sets up this site's jobs (slurm/env.sh says how)" >&2
            kill -HUP "$job_watcher"
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

# At the time limit everything is told to end, and killed KillWait later: ranks that need longer for their step take srun
# and this shell with them. So the job is put back into the queue at once.
job_watch() {
    local job
    trap 'job=$(scontrol show job "$(job_id)"); [[ $job == *Reason=TimeLimit* && $job == *Requeue=1* ]] &&
        scontrol requeue "$(job_id)"; exit' TERM
    trap '' INT USR1 USR2
    trap 'kill $!; exit' HUP # from job_end
    while :; do
        sleep 3600 >&- 2>&- & # nobody waits for its output
        wait
    done
}

job_end() {
    local code=$1 job id
    id=$(job_id)
    kill -HUP "$job_watcher" 2>/dev/null
    # 75: stopped, or worth another try. Over 128: killed at the time limit, before all was said
    if ((code != 75 && code <= 128)); then exit "$code"; fi
    for _ in 1 2 3; do
        job=$(scontrol show job "$id" 2>/dev/null) && [[ $job == *JobState=* ]] && break
        sleep 1
    done
    if [[ $job == *" Restarts=$((${SLURM_RESTART_COUNT:-0} + 1)) "* ]]; then
        exit "$code" # it is requeued already: by Slurm, or job_watch
    elif [[ $job != *Reason=TimeLimit* ]] && { [[ $job != *JobState=RUNNING* ]] || ((code != 75)); }; then
        exit "$code" # cancelled, or killed by something else: to be left alone
    elif [[ $job == *Requeue=0* ]]; then
        echo "stopped, and not requeued (the job is --no-requeue, or was cancelled); the same command goes on"
        exit "$code"
    fi
    echo "requeueing job $id"
    scontrol requeue "$id" || { echo "error: job $id cannot be requeued; the same sbatch command goes on" >&2; exit "$code"; }
    exit "$code"
}

# Sourced by the scripts beside it, in the repository root: the site's values, and what the jobs have in common.
if [[ ! -f slurm/site.env ]]; then
    echo "error: $PWD has no slurm/site.env; submit from the repository root" >&2
    exit 1
fi
set -a
source slurm/site.env
set +a
export PATH="$EMBERVLM_VENV/bin:$PATH" PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
export SRUN_CPUS_PER_TASK="${SLURM_CPUS_PER_TASK:-1}" # since Slurm 22.05 srun does not take sbatch's
export OMP_NUM_THREADS="$SRUN_CPUS_PER_TASK"

# submit SBATCH_OPTIONS SCRIPT FLAGS: sbatch without this job's own variables, which would stand over the new one's
submit() {
    local name drop=(-u SRUN_CPUS_PER_TASK -u OMP_NUM_THREADS)
    for name in "${!SLURM_@}"; do
        [[ $name == SLURM_CONF ]] || drop+=(-u "$name") # where the site's configuration is
    done
    env "${drop[@]}" sbatch "$@"
}

behind=() # what the script takes behind its flags of launch/train.py

# on_these_nodes SCRIPT FLAGS: go on in a job of the recipe's nodes; elsewhere submit one and leave
on_these_nodes() {
    local script=$1 options
    shift
    if [[ -n ${SLURM_JOB_ID:-} ]] && python -m embervlm.slurm fits "${phase[@]}" "$@"; then
        return
    fi
    options=$(python -m embervlm.slurm options "${phase[@]}" "$@")
    if [[ -n ${EMBERVLM_SUBMITTED:-} ]]; then
        echo "error: Slurm gave other nodes than asked for with: $options. Look at EMBERVLM_SBATCH_GPU" >&2
        exit 1
    fi
    # shellcheck disable=SC2086  # several options in one string
    EMBERVLM_SUBMITTED=1 submit $options "$script" "$@" "${behind[@]}"
    exit
}

# train FLAGS: one process per GPU, then back into the queue where that helps
train() {
    local code=0
    python -m embervlm.slurm started "${phase[@]}" "$@"
    trap : TERM USR2 # the processes answer these; this shell stays to requeue
    srun --kill-on-bad-exit=1 python launch/train.py --stages 4 "${phase[@]}" "$@" || code=$?
    python -m embervlm.slurm ended --exit_code "$code" "${phase[@]}" "$@"
}

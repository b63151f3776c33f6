# Sourced by the scripts beside it, in the repository root: the site's values, and what all jobs share.
trap 'echo "error: slurm/site.env failed at: $BASH_COMMAND" >&2' ERR
set -a +u # `module` may read variables that are not set
source slurm/site.env
set +a -u
trap - ERR
if [[ ! -x $EMBERVLM_VENV/bin/python ]]; then
    echo "error: no virtual environment in $EMBERVLM_VENV: run \`make install\`, or set EMBERVLM_VENV in slurm/site.env" >&2
    exit 1
fi
export PATH="$EMBERVLM_VENV/bin:$PATH" PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
export SRUN_CPUS_PER_TASK="${SLURM_CPUS_PER_TASK:-1}" # since Slurm 22.05 srun does not inherit sbatch's
export OMP_NUM_THREADS="$SRUN_CPUS_PER_TASK"

phase=    # the phase that the script trains; empty for evaluation
behind=() # what the script takes after its flags of launch/train.py
step=()   # options of srun
how=()    # how this script was started
if [[ ${0##*/} == slurm_script ]]; then how+=(--batch); fi # Slurm runs its own copy of a job's script
if [[ ${1:-} == --submitted ]]; then                       # among the arguments: the environment may not reach the job
    how+=(--submitted)
    shift
fi

decide() { python -m embervlm.run.slurm "$1" "${how[@]}" ${phase:+--of_phase "$phase"} "${@:2}"; }

# on_these_nodes SCRIPT FLAGS: continue in a job on the right nodes; elsewhere submit one and exit
on_these_nodes() {
    local found
    found=$(decide place --script "$@" "${behind[@]}")
    if [[ $found == "Submitted batch job "* ]]; then
        echo "$found"
        exit
    fi
    if [[ -n $found ]]; then mapfile -t step <<<"$found"; fi
}

# run PROGRAM ARGUMENTS: as tasks of this job
run() {
    local site wrapper
    eval "site=(${EMBERVLM_SRUN_OPTIONS:-}) wrapper=(${EMBERVLM_WRAPPER:-})" # their quotes are respected
    # --export: otherwise srun inherits what sbatch was told, such as SBATCH_EXPORT=NONE
    # 70: if srun itself fails, for example because the controller is away, another start may succeed
    SLURM_EXIT_ERROR=70 srun --export=ALL "${step[@]}" "${site[@]}" "${wrapper[@]}" "$@"
}

# train FLAGS: one process per GPU, then requeue the job if that helps
train() {
    local code=0
    decide started "$@"
    trap : TERM USR2 # the processes handle these; this shell stays to requeue
    step+=(--kill-on-bad-exit=1)
    run python launch/train.py --stages 4 --phase "$phase" "$@" || code=$?
    decide ended --exit_code "$code" "$@"
}

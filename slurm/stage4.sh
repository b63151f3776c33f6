#!/usr/bin/env bash
# Phase 1, phase 2 and the evaluation, each after the one before:
#   bash slurm/stage4.sh --cluster a100x4 [flags of launch/train.py]
#SBATCH --job-name=embervlm-stage4
#SBATCH --output=%x-%j.log
set -euo pipefail
shopt -s inherit_errexit # a phase that Slurm refuses ends this, and nothing is submitted after it
cd "${SLURM_SUBMIT_DIR:-.}"
source slurm/job.sh

# chain PHASE PREVIOUS SCRIPT FLAGS: submit after job PREVIOUS, and print the new job's number
chain() {
    local phase=(${1:+--phase "$1"}) after=(${2:+--dependency=afterok:$2 --kill-on-invalid-dep=yes}) script=$3 options id
    shift 3
    options=$(python -m embervlm.slurm options "${phase[@]}" "$@")
    # shellcheck disable=SC2086  # several options in one string
    id=$(submit --parsable "${after[@]}" $options "$script" "$@")
    echo "${id%%;*}"
}

output_dir=$(python -m embervlm.slurm output_dir "$@")
first=$(chain 1 "" slurm/stage4_phase1.sh "$@")
# phase 2 goes on from phase 1, wherever that started from
second=$(chain 2 "$first" slurm/stage4_phase2.sh "$@" --resume_from "$output_dir/stage4/phase1/checkpoint-final")
third=$(chain "" "$second" slurm/evaluate.sh "$@")
echo "phase 1 is job $first, phase 2 job $second, evaluation job $third"

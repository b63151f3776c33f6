#!/usr/bin/env bash
# Phase 1, phase 2, phase 3 where the YAML has it, and the evaluation, one after the other:
#   bash slurm/stage4.sh --cluster a100x4 [flags of launch/train.py]
#SBATCH --job-name=embervlm-stage4
#SBATCH --output=%x-%j.log
set -euo pipefail
for root in "$(dirname "$0")/.." . .. "${SLURM_SUBMIT_DIR:-.}"; do # in a job $0 is Slurm's private copy
    if [[ -f $root/slurm/job.sh ]]; then break; fi
done
cd "$root"
[[ -f slurm/job.sh ]] || { echo "error: no slurm/job.sh in $PWD; submit from the repository root" >&2 && exit 1; }
source slurm/job.sh

decide chain --script slurm/stage4.sh "$@"

#!/usr/bin/env bash
# Phase 3 of Stage 4, from answers alone:  sbatch slurm/stage4_phase3.sh --cluster a100x4 [flags of launch/train.py]
# Without a recipe, here or in site.env, it trains on what the job was given: sbatch --gres=gpu:4 slurm/stage4_phase3.sh
# In a small job, or outside a job, it submits itself on the recipe's nodes, with the options given to sbatch.
#SBATCH --job-name=embervlm-phase3
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append      # a requeued job keeps its log
#SBATCH --requeue
#SBATCH --signal=USR2@180       # 180 s before the limit: save, then requeue. Not B:, which only tells this shell
set -euo pipefail
for root in "$(dirname "$0")/.." . .. "${SLURM_SUBMIT_DIR:-.}"; do # in a job $0 is Slurm's private copy
    if [[ -f $root/slurm/job.sh ]]; then break; fi
done
cd "$root"
[[ -f slurm/job.sh ]] || { echo "error: no slurm/job.sh in $PWD; submit from the repository root" >&2 && exit 1; }
source slurm/job.sh
phase=3
on_these_nodes slurm/stage4_phase3.sh "$@"
train "$@"

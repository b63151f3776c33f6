#!/usr/bin/env bash
# Phase 1 of Stage 4:  sbatch slurm/stage4_phase1.sh --cluster a100x4 [flags of launch/train.py]
# In a job of other nodes than the recipe's, or in none, it submits itself with the right ones.
#SBATCH --job-name=embervlm-phase1
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append      # a requeued job keeps its log
#SBATCH --requeue
#SBATCH --signal=USR2@180       # 180 s before the limit: save, then requeue. Not B:, which only tells this shell
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-.}" # $0 is Slurm's private copy
source slurm/job.sh
phase=(--phase 1)
on_these_nodes slurm/stage4_phase1.sh "$@"
train "$@"

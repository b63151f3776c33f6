#!/usr/bin/env bash
# Metrics of a finished phase 2 on the test split, on one GPU:
#   sbatch slurm/evaluate.sh --cluster a100x4 [the flags of launch/train.py that the run had]
#SBATCH --job-name=embervlm-evaluate
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-.}"
source slurm/job.sh
phase=()
on_these_nodes slurm/evaluate.sh "$@"
output_dir=$(python -m embervlm.slurm output_dir "$@")
srun python scripts/evaluate.py --stage 4 --checkpoint "$output_dir/stage4/phase2/checkpoint-final" \
    --reasoning_metrics all --split test --output_file "$output_dir/results/stage4_eval.json" --save_reasoning_samples

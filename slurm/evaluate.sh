#!/usr/bin/env bash
# Metrics on one GPU: of a finished phase 2 on the test split, or of what flags of scripts/evaluate.py behind -- say:
#   sbatch slurm/evaluate.sh --cluster a100x4 [the flags of launch/train.py that the run had]
#   sbatch slurm/evaluate.sh --cluster a100x4 -- --checkpoint DIR --split val --output_file FILE
#SBATCH --job-name=embervlm-evaluate
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-.}"
source slurm/job.sh
phase=() run=()
while (($#)) && [[ $1 != -- ]]; do
    run+=("$1")
    shift
done
behind=("$@")
on_these_nodes slurm/evaluate.sh "${run[@]}"
if ((${#behind[@]})); then
    evaluate=("${behind[@]:1}")
else
    output_dir=$(python -m embervlm.slurm output_dir "${run[@]}")
    evaluate=(--checkpoint "$output_dir/stage4/phase2/checkpoint-final" --reasoning_metrics all --split test
        --output_file "$output_dir/results/stage4_eval.json" --save_reasoning_samples)
fi
srun python scripts/evaluate.py --stage 4 "${evaluate[@]}"

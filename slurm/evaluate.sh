#!/usr/bin/env bash
# Metrics on one GPU: of a finished phase 2 on the test split, or as given by flags of scripts/evaluate.py after --:
#   sbatch slurm/evaluate.sh --cluster a100x4 [the flags of launch/train.py that the run had]
#   sbatch slurm/evaluate.sh --cluster a100x4 -- --checkpoint DIR --split val --output_file FILE
#SBATCH --job-name=embervlm-evaluate
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
set -euo pipefail
for root in "$(dirname "$0")/.." . .. "${SLURM_SUBMIT_DIR:-.}"; do # in a job $0 is Slurm's private copy
    if [[ -f $root/slurm/job.sh ]]; then break; fi
done
cd "$root"
[[ -f slurm/job.sh ]] || { echo "error: no slurm/job.sh in $PWD; submit from the repository root" >&2 && exit 1; }
source slurm/job.sh
flags=()
while (($#)) && [[ $1 != -- ]]; do
    flags+=("$1")
    shift
done
behind=("$@")
on_these_nodes slurm/evaluate.sh "${flags[@]}"
if ((${#behind[@]})); then
    evaluate=("${behind[@]:1}")
else
    output_dir=$(decide output_dir "${flags[@]}")
    last=phase2
    if [[ -d $output_dir/stage4/phase3/checkpoint-final ]]; then last=phase3; fi
    evaluate=(--checkpoint "$output_dir/stage4/$last/checkpoint-final" --reasoning_metrics all --split test
        --output_file "$output_dir/results/stage4_eval.json" --save_reasoning_samples)
fi
run python scripts/evaluate.py --stage 4 "${evaluate[@]}"

#!/usr/bin/env bash
# Reasoning data by an array of jobs, each making a share of the records:
#   sbatch slurm/generate_data.sh --teacher_model rules --output_file data/stage4/reasoning_data.json
# Share i is written to reasoning_data-<i>.json beside the output file; `embervlm data merge` joins them.
# To repeat share 3 alone: sbatch --array=3 ...; for 16 shares: EMBERVLM_SHARDS=16 sbatch --array=0-15 ...
#SBATCH --job-name=embervlm-data
#SBATCH --output=%x-%A_%a.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --array=0-7
#SBATCH --cpus-per-task=4
set -euo pipefail
for root in "$(dirname "$0")/.." . .. "${SLURM_SUBMIT_DIR:-.}"; do # in a job $0 is Slurm's private copy
    if [[ -f $root/slurm/job.sh ]]; then break; fi
done
cd "$root"
[[ -f slurm/job.sh ]] || { echo "error: no slurm/job.sh in $PWD; submit from the repository root" >&2 && exit 1; }
source slurm/job.sh
output_file= flags=()
while (($#)); do
    case $1 in
    --output_file) output_file=$2 && shift 2 ;;
    --output_file=*) output_file=${1#*=} && shift ;;
    *) flags+=("$1") && shift ;;
    esac
done
: "${SLURM_ARRAY_TASK_ID:?run it as an array: sbatch slurm/generate_data.sh ...}" "${output_file:?give --output_file}"
share="${output_file%.*}-$SLURM_ARRAY_TASK_ID.${output_file##*.}"
step=(--nodes=1 --ntasks=1)
run python scripts/generate_reasoning_data.py "${flags[@]}" --output_file "$share" \
    --shard "$SLURM_ARRAY_TASK_ID/${EMBERVLM_SHARDS:-8}"

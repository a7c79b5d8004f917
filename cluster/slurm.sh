#!/bin/bash
# Train on several nodes under Slurm: sbatch cluster/slurm.sh config/train_gpt2.py --out_dir=/shared/out
#
# Arguments are those of train.py. Options given to sbatch win over these:
#SBATCH --job-name=nanogpt
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=nanogpt-%j.log

# A process for each task, without torchrun: Slurm starts, watches and signals them, and the queue restarts the job.
export PYTHON="${PYTHON:-.venv/bin/python}"
MAX_RESTARTS="${MAX_RESTARTS:-100}"
MAX_STOPS=10
stops="nanogpt-$SLURM_JOB_ID.stops" # a line for each status 3 in a row
MASTER_ADDR="${MASTER_ADDR:-$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)}"
export MASTER_ADDR
export MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))

# Slurm sends USR1 to this shell two minutes before the time limit. Each process gets SIGTERM then, at which they finish
# the step, save, and end with status 143.
trap 'scancel --signal=TERM "$SLURM_JOB_ID"' USR1

srun --kill-on-bad-exit=1 bash -c '
  export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS
  export LOCAL_WORLD_SIZE=${SLURM_STEP_TASKS_PER_NODE%%[(,]*} # "8(x2)" or "8,4": 8
  exec "$PYTHON" train.py "$@" --resume=auto' train "$@" &
step=$!
wait "$step"
status=$?
while kill -0 "$step" 2>/dev/null; do # the signal interrupted the wait
  wait "$step"
  status=$?
done

# 0: done. 2: wrong usage; another start would end so too. 3: perhaps a network that failed, perhaps a run that diverged,
# which ends so at each start: resume a few times. Others: resume.
echo "status $status after restart ${SLURM_RESTART_COUNT:-0}"
if [ "$status" -eq 3 ]; then
  date >>"$stops"
else
  rm -f "$stops"
fi
if [ "$status" -eq 0 ] || [ "$status" -eq 2 ] || [ "${SLURM_RESTART_COUNT:-0}" -ge "$MAX_RESTARTS" ]; then
  exit "$status"
fi
if [ "$status" -eq 3 ] && [ "$(wc -l <"$stops")" -gt "$MAX_STOPS" ]; then
  exit "$status"
fi
scontrol requeue "$SLURM_JOB_ID"

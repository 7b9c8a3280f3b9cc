#!/usr/bin/env bash
# Several processes through torchrun, as many on each node as trainer.devices says, one per GPU.
#
#   train/launch/torchrun.sh +experiment=cla_1b_mqa_cla2 folder=runs/cla_1b_mqa_cla2 trainer=fsdp trainer.devices=8
#
# On several nodes the same command on each of them, with trainer.num_nodes=N and HEAD=HOST[:PORT], one of the nodes, in the
# environment; the folder is on a file system that all of them share.
# With MAX_RESTARTS=N in the environment torchrun starts all processes again when one fails, up to N times; they go on in
# `folder` from the newest checkpoint.
# torchrun kills what is still alive 30 seconds after a SIGTERM: under SLURM use slurm.sbatch, which needs no torchrun.
# Typed again, it goes on where it stopped, if it was given a folder. DRY_RUN=1 prints the command.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
args=("$@")
source train/launch/common.sh

devices=$(value trainer.devices 1)
nodes=$(value trainer.num_nodes 1)
if ((nodes == 1)); then
    rendezvous=(--standalone)
else
    [[ -n ${HEAD:-} ]] || fail "trainer.num_nodes is $nodes: set HEAD=HOST[:PORT] to one of the nodes, the same on each"
    [[ -n $(value folder "") ]] || fail "trainer.num_nodes is $nodes: give folder=, on a file system all nodes share"
    rendezvous=(--nnodes "$nodes" --rdzv-backend c10d --rdzv-endpoint "$HEAD" --rdzv-id "${RDZV_ID:-kvfrontier}")
fi

resume_if_started
command=("$python" -m torch.distributed.run "${rendezvous[@]}")
program=(train/pretrain.py)
if ((${MAX_RESTARTS:-0} > 0)); then
    [[ -n $(value folder "$(value resume "")") ]] || fail "MAX_RESTARTS is $MAX_RESTARTS: give folder=, where a restart goes on"
    # Or processes that are started again find the addresses of those before them in torchrun's store (pytorch#135712).
    command=(env TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 "${command[@]}" --max-restarts "$MAX_RESTARTS")
    program=(--no-python train/launch/single.sh) # which resumes
fi
become "${command[@]}" --nproc-per-node "$devices" "${program[@]}" "${args[@]}"

#!/usr/bin/env bash
# One process: one GPU, or the CPU where there is none.
#
#   train/launch/single.sh +experiment=gpu_125m +arch=cla2 folder=runs/cla2-125m
#
# Typed again, it goes on where it stopped, if it was given a folder. DRY_RUN=1 prints the command.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
args=("$@")
source train/launch/common.sh

[[ ${TORCHELASTIC_RESTART_COUNT:-} == 0 ]] || resume_if_started # a process of torchrun.sh goes on only when restarted
become "$python" train/pretrain.py "${args[@]}"

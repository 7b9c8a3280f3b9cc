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

resume_if_started
become "$python" train/pretrain.py "${args[@]}"

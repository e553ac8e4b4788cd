#!/usr/bin/env bash
# verl's own trainer on a Ray cluster, with a configuration of this folder. On every node:
#
#   pip install "verl[vllm]==0.9.1" "fiberpo[verl]"
#   python3 -c "import fiberpo.integrations.verl"       # verl hides a plugin that fails to load
#   ray start --head --port 6379                        # first node
#   ray start --address FIRST_NODE:6379                 # every other node
#
# and then once, on the first node:
#
#   NNODES=2 examples/verl/launch.sh data.train_files=math.parquet actor_rollout_ref.model.path=...
#
# CONFIG=grpo runs the same without fiberpo. Other arguments override the configuration.
set -euo pipefail
here="$(cd "$(dirname "$0")" && pwd)"
export RAY_ADDRESS="${RAY_ADDRESS:-auto}"
exec "${PYTHON:-python3}" -m verl.trainer.main_ppo \
    --config-path "$here" --config-name "${CONFIG:-fiberpo_domain}" "$@" \
    trainer.nnodes="${NNODES:-1}" trainer.n_gpus_per_node="${GPUS_PER_NODE:-8}"

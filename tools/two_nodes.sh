#!/usr/bin/env bash
# Trains on two network namespaces that stand for machines, kills one, and waits for the end. Needs root.
#
#     tools/two_nodes.sh worker|node TOKENS RUN
#
# worker: the training process of the second machine is killed; node: all of it, torchrun too, which is then started
# anew. Compare RUN/log.jsonl with that of one process: fitv2 train debug --data TOKENS --out ALONE, same options.
set -euo pipefail
killed=$1 tokens=$2 run=$3
export OMP_NUM_THREADS=1 TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
options=(--steps 200 --batch-size 8 --save-every 10 --sample-every 1000 --validate-every 1000)

cleanup() { ip netns del fitv2-0 2>/dev/null || true; ip netns del fitv2-1 2>/dev/null || true; }
trap cleanup EXIT
cleanup
ip netns add fitv2-0
ip netns add fitv2-1
ip link add veth0 netns fitv2-0 type veth peer name veth1 netns fitv2-1
for i in 0 1; do
  ip -n fitv2-$i addr add 10.9.0.$((i + 1))/24 dev veth$i
  ip -n fitv2-$i link set lo up
  ip -n fitv2-$i link set veth$i up
done

node() { # number
  GLOO_SOCKET_IFNAME=veth$1 exec ip netns exec "fitv2-$1" python -m torch.distributed.run \
    --nnodes 2 --nproc-per-node 1 --max-restarts 4 --rdzv-backend c10d --rdzv-endpoint 10.9.0.1:29500 \
    --rdzv-conf is_host=$([[ $1 = 0 ]] && echo true || echo false) --local-addr "10.9.0.$(($1 + 1))" \
    -m fitv2 train debug --data "$tokens" --out "$run" "${options[@]}"
}
node 0 & first=$!
node 1 & second=$!
until [[ -e $run/checkpoints/step-0000040 ]]; do sleep 0.05; done
for process in $(ip netns pids fitv2-1); do
  if [[ $killed = node ]] || ! grep -qa distributed.run "/proc/$process/cmdline"; then kill -9 "$process"; fi
done
if [[ $killed = node ]]; then
  sleep 3
  node 1 & second=$!
fi
wait $first
wait $second

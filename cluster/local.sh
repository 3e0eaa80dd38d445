#!/usr/bin/env bash
# Start a one-node Ray cluster on the loopback interface, submit the whole run as a job, and end the node again.
#   bash cluster/local.sh [CONFIG] --out RUN [key=value ...]
set -euo pipefail
cd "$(dirname "$0")/.."
bin="${VIRTUAL_ENV:-$PWD/.venv}/bin"
export RAY_AUTH_MODE=disabled RAY_TRAIN_HEALTH_CHECK_INTERVAL_S=0.2 OMP_WAIT_POLICY=PASSIVE
port="${DASHBOARD_PORT:-8265}"

"$bin/ray" start --head --block --disable-usage-stats --num-cpus="$(($(nproc) + 2))" \
  --node-ip-address=127.0.0.1 --dashboard-host=127.0.0.1 --dashboard-port="$port" >/dev/null 2>&1 &
node=$!
trap 'kill "$node" 2>/dev/null; wait "$node" 2>/dev/null || true' EXIT
for _ in $(seq 60); do
  "$bin/ray" job list --address "http://127.0.0.1:$port" >/dev/null 2>&1 && break
  kill -0 "$node" 2>/dev/null || { echo "the head node did not start; is port $port or 6379 in use?" >&2; exit 1; }
  sleep 1
done
"$bin/ray" job submit --address "http://127.0.0.1:$port" --working-dir . \
  --runtime-env-json='{"excludes": ["runs", ".venv", ".git", "docs"]}' -- "$bin/python" jobs/run.py "$@"

#!/usr/bin/env bash
# Trains on a slice of Cloud TPU VMs. Every host runs the same command, and jax finds the others.
#
#   export RECIPE_NAME=pod RECIPE_ZONE=us-west4-b RECIPE_PROJECT=my-project
#   tpu_vm.sh create --type=v5litepod-256 --version=v2-alpha-tpuv5-lite
#   tpu_vm.sh install
#   tpu_vm.sh run -- launch/train.py --config=configs/gemma2_2b.py --config.data.mode=packed \
#       --config.data.max_tokens=20000000000 --decoder=gs://my-bucket/gemma-2-2b \
#       --data=gs://my-bucket/data --workdir=gs://my-bucket/runs/coprocessor
#   tpu_vm.sh logs [--worker=3]
#   tpu_vm.sh stop
#   tpu_vm.sh delete
#
# --spot=yes takes capacity that may be withdrawn. --dry_run prints the commands, one a line, and runs
# none. It needs no cloud tool.
#
# Versions of the runtime are v2-alpha-tpuv5-lite for v5e, v2-alpha-tpuv5 for v5p and
# v2-alpha-tpuv6e for v6e. Types of v5p count two cores a chip: v5p-256 has 128 chips.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
source "$root/launch/recipes/common.sh"

action=${1:-}
name=${RECIPE_NAME:-} zone=${RECIPE_ZONE:-} project=${RECIPE_PROJECT:-}
type='' version='' worker=0 spot=no
read_flags 'name zone project type version worker spot' "${@:2}"

tpu_vm() {
  run gcloud compute tpus tpu-vm "$@" --zone="$zone" --project="$project"
}

# Runs a command in the root of the source tree, on all hosts or one.
on_hosts() {
  tpu_vm ssh "$name" --worker="$1" --command="cd latent_deliberation && $(quote "${@:2}")"
}

create() {
  [[ -n $type && -n $version ]] ||
    fail 'create needs --type=v5litepod-256 and --version=v2-alpha-tpuv5-lite, or others'
  [[ $spot == yes || $spot == no ]] || fail "--spot=$spot: yes or no"
  local wanted=(--accelerator-type="$type" --version="$version" --scopes=cloud-platform)
  if [[ $spot == yes ]]; then
    wanted+=(--spot)
  fi
  tpu_vm create "$name" "${wanted[@]}"
}

install() {
  # Only what is committed is copied. So a run can be repeated.
  local archive=${TMPDIR:-/tmp}/latent_deliberation.tgz
  run git -C "$root" archive --prefix=latent_deliberation/ --output="$archive" HEAD
  tpu_vm scp "$archive" "$name:" --worker=all
  tpu_vm ssh "$name" --worker=all --command='tar xzf latent_deliberation.tgz'
  on_hosts all bash launch/recipes/host.sh install
}

case $action in
  create | install | run | logs | stop | delete) require name zone project ;;
  *) fail "'$action' is not an action: create, install, run, logs, stop or delete" ;;
esac
case $action in
  create) create ;;
  install) install ;;
  run)
    ((${#rest[@]})) || fail 'run needs a script and its flags after --: run -- launch/train.py ...'
    on_hosts all bash launch/recipes/host.sh start -- "${rest[@]}"
    ;;
  logs) on_hosts "$worker" tail --lines=100 --follow ../run.log ;;
  stop) on_hosts all bash launch/recipes/host.sh stop ;;
  delete) tpu_vm delete "$name" --quiet ;;
esac

#!/usr/bin/env bash
# Trains on TPU slices of a GKE cluster, one or several, with xpk (pip install xpk).
#
#   export RECIPE_CLUSTER=tpus RECIPE_ZONE=us-west4-b RECIPE_PROJECT=my-project
#   export RECIPE_TYPE=v5litepod-256
#   export RECIPE_IMAGE=us-docker.pkg.dev/my-project/images/latents
#   gke.sh cluster --slices=2 --capacity=spot
#   gke.sh image
#   gke.sh run --name=first --slices=2 -- launch/train.py --config=configs/gemma2_2b.py \
#       --config.mesh.replica=2 --config.training.accumulation=2 \
#       --config.evaluation.batch_size=512 --config.data.mode=packed \
#       --config.data.max_tokens=20000000000 --decoder=gs://my-bucket/gemma-2-2b \
#       --data=gs://my-bucket/data --workdir=gs://my-bucket/runs/coprocessor
#   gke.sh logs --name=first
#   gke.sh stop --name=first
#   gke.sh delete
#
# With several slices, --config.mesh.replica must be their number. Then only gradients cross the
# network between slices, once a step. --capacity is spot, on-demand or the name of a reservation.
# --dry_run prints the commands, one a line, and runs none.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
source "$root/launch/recipes/common.sh"

action=${1:-}
cluster=${RECIPE_CLUSTER:-} zone=${RECIPE_ZONE:-} project=${RECIPE_PROJECT:-}
type=${RECIPE_TYPE:-} image=${RECIPE_IMAGE:-}
name='' slices=1 capacity=''
read_flags 'cluster zone project type image name slices capacity' "${@:2}"
[[ $slices =~ ^[1-9][0-9]*$ ]] || fail "--slices=$slices: the number of slices, 1 or more"

# Calls xpk on the cluster.
on_cluster() {
  run xpk "$@" --cluster="$cluster" --zone="$zone" --project="$project"
}

make_cluster() {
  require type
  local option
  case $capacity in
    '') fail 'cluster needs --capacity: spot, on-demand or the name of a reservation' ;;
    spot | on-demand) option=--$capacity ;;
    *) option=--reservation=$capacity ;;
  esac
  on_cluster cluster create --tpu-type="$type" --num-slices="$slices" "$option"
}

make_image() {
  require image
  run docker build --file="$root/launch/recipes/Dockerfile" --tag="$image" "$root"
  run docker push "$image"
}

start() {
  require type image
  ((${#rest[@]})) || fail 'run needs a script and its flags after --: run -- launch/train.py ...'
  # With exec, python gets the signal that ends a pod, and saves. It then ends with code 143, which
  # is no success: all pods start again from the newest checkpoint, as when one is lost.
  local command="cd /latent_deliberation && exec $(quote python "${rest[@]}")"
  on_cluster workload create --workload="$name" --tpu-type="$type" --num-slices="$slices" \
    --docker-image="$image" --env-file="$root/launch/recipes/tpu.env" --max-restarts=50 \
    --termination-grace-period-seconds=300 --command="$command"
}

# Prints the log of process 0 of every slice.
follow() {
  run gcloud container clusters get-credentials "$cluster" --location="${zone%-*}" \
    --project="$project"
  run kubectl logs --follow --prefix --all-containers --tail=100 \
    --selector="jobset.sigs.k8s.io/jobset-name=$name,batch.kubernetes.io/job-completion-index=0"
}

case $action in
  image) ;;
  cluster | delete) require cluster zone project ;;
  run | logs | stop)
    require cluster zone project
    [[ $name =~ ^[a-z]([a-z0-9-]*[a-z0-9])?$ ]] ||
      fail "--name=$name: Kubernetes allows small letters, digits and -, with a letter first"
    ;;
  *) fail "'$action' is not an action: cluster, image, run, logs, stop or delete" ;;
esac
case $action in
  cluster) make_cluster ;;
  image) make_image ;;
  run) start ;;
  logs) follow ;;
  stop) on_cluster workload delete --workload="$name" ;;
  delete) on_cluster cluster delete ;;
esac

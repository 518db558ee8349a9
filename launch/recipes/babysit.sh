#!/usr/bin/env bash
# Keeps a run alive on a preemptible slice of Cloud TPU VMs: it asks for the slice by a queued
# resource, installs, trains, and begins again when the slice is taken away or the run fails.
#
#   export RECIPE_NAME=pod RECIPE_ZONE=us-west4-b RECIPE_PROJECT=my-project
#   babysit.sh keep --type=v5litepod-256 --version=v2-alpha-tpuv5-lite -- launch/train.py \
#       --config=configs/gemma2_2b.py --config.data.mode=packed \
#       --config.data.max_tokens=20000000000 --decoder=gs://my-bucket/gemma-2-2b \
#       --data=gs://my-bucket/data --workdir=gs://my-bucket/runs/coprocessor \
#       --config.training.loop.save_minutes=10
#   babysit.sh state
#   babysit.sh stop
#
# `keep` runs until training ends with code 0, and then deletes the slice; --delete=no keeps it. It
# looks every --minutes=2. It gives up after --tries=5 failures in a row that each come within half
# an hour, since those have another reason than a slice that was taken away. It also gives up where
# 15 looks in a row do not reach a host of a slice that is there. Start it on a machine that stays,
# in tmux for instance. Started again, it goes on where things are.
#
# `state` prints the state of the slice and of the run on its hosts. `stop` lets the run save and
# end, and deletes the slice; end `keep` before it, or it asks for the slice again. --spot=no takes
# capacity that is not withdrawn.
#
# --dry_run prints the commands of one life, one a line, and runs none.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
source "$root/launch/recipes/common.sh"

action=${1:-}
name=${RECIPE_NAME:-} zone=${RECIPE_ZONE:-} project=${RECIPE_PROJECT:-}
type='' version='' spot=yes minutes=2 tries=5 delete=yes
read_flags 'name zone project type version spot minutes tries delete' "${@:2}"
quick=$((30 * 60)) # seconds in which a failure counts towards --tries
most_lost=15 # looks in a row that do not reach a host

# Every action but a dry run needs it. Without this, `keep` would wait for a cloud that answers.
require_gcloud() {
  [[ -n $dry_run ]] || command -v gcloud >/dev/null ||
    fail 'gcloud is not installed, or not in PATH: see https://cloud.google.com/sdk/docs/install'
}

queued() {
  run gcloud compute tpus queued-resources "$1" "$name" "${@:2}" --zone="$zone" \
    --project="$project"
}

vm() {
  local flags=(--name="$name" --zone="$zone" --project="$project")
  if [[ -n $dry_run ]]; then
    flags+=(--dry_run)
  fi
  "$root/launch/recipes/tpu_vm.sh" "$1" "${flags[@]}" "${@:2}"
}

create() {
  local wanted=(--node-id="$name" --accelerator-type="$type" --runtime-version="$version"
    --scopes=cloud-platform --async)
  if [[ $spot == yes ]]; then
    wanted+=(--spot)
  fi
  queued create "${wanted[@]}"
}

# The state of the slice: ACTIVE, SUSPENDED, WAITING_FOR_RESOURCES and so on; empty without one, and
# UNKNOWN, with the error, where the cloud does not say.
slice_state() {
  local errors
  errors=$(mktemp)
  if ! queued describe --format='value(state.state)' 2>"$errors"; then
    # Advice of many lines may follow an error.
    grep --quiet NOT_FOUND "$errors" ||
      echo "UNKNOWN: $(grep --max-count=1 '^ERROR' "$errors" || tail --lines=1 "$errors")"
  fi
  rm -f "$errors"
}

# What each host says of the run, one word or two a line: new, none, running, lost or "ended CODE".
# Fails where a host cannot be reached.
run_state() {
  run gcloud compute tpus tpu-vm ssh "$name" --worker=all --zone="$zone" --project="$project" \
    --command='if [[ -e installed ]]; then cd latent_deliberation && bash launch/recipes/host.sh state; else echo new; fi'
}

begin() {
  vm run -- "${rest[@]}"
}

say() {
  echo "$(date '+%F %T') $*" >&2
}

keep() {
  local failures=0 begun='' lost=0 slice hosts
  while true; do
    slice=$(slice_state)
    case $slice in
      '')
        say 'there is no slice: asking for one'
        create || say 'the cloud refused; trying again'
        ;;
      ACTIVE)
        # A host that cannot be reached is usually one that is about to be taken away.
        if hosts=$(run_state | sort --unique); then
          lost=0
        else
          ((lost += 1))
        fi
        if ((lost)); then
          say 'a host cannot be reached'
          ((lost < most_lost)) ||
            fail "a host could not be reached $lost times in a row; try:" \
              "gcloud compute tpus tpu-vm ssh $name --zone=$zone." \
              'The slice is still there and costs money: delete it with babysit.sh stop'
        elif [[ $hosts == 'ended 0' ]]; then
          say 'the run is done'
          [[ $delete != yes ]] || queued delete --force --quiet ||
            fail 'The slice could not be deleted and costs money: delete it with babysit.sh stop'
          return
        elif [[ $hosts == *running* ]]; then
          say 'the run is at work'
        else
          if [[ -n $begun ]]; then
            say "the run has ended: ${hosts//$'\n'/, }"
            ((failures = SECONDS - begun < quick ? failures + 1 : 0)) || true
            ((failures < tries)) ||
              fail "the run failed $failures times in a row; see: tpu_vm.sh logs --name=$name." \
                'The slice is still there and costs money: delete it with babysit.sh stop'
          fi
          begun=$SECONDS
          if [[ $hosts != *new* ]] || { say 'installing on new hosts' && vm install; }; then
            say 'starting the run'
            begin || say 'it did not start; trying again'
          else
            say 'the installation failed; trying again'
          fi
        fi
        ;;
      SUSPENDED | FAILED)
        say "the slice is $slice: asking for another one"
        begun=''
        { queued delete --force --quiet && create; } || say 'the cloud refused; trying again'
        ;;
      *) say "the slice is $slice" ;;
    esac
    sleep "$(awk "BEGIN {print $minutes * 60}")"
  done
}

stop() {
  vm stop || true # there may be no run any more
  # The slice may go when the run has saved and ended; ten minutes are enough for that.
  local end=$((SECONDS + 600)) hosts=running
  while [[ -z $dry_run && $hosts == *running* ]] && ((SECONDS < end)); do
    # A host that cannot be reached may still be saving.
    hosts=$(run_state) || hosts=running
    [[ $hosts != *running* ]] || sleep 5
  done
  queued delete --force --quiet
}

case $action in
  keep)
    require name zone project
    [[ -n $type && -n $version ]] ||
      fail 'keep needs --type=v5litepod-256 and --version=v2-alpha-tpuv5-lite, or others'
    [[ $spot == yes || $spot == no ]] || fail "--spot=$spot: yes or no"
    [[ $delete == yes || $delete == no ]] || fail "--delete=$delete: yes or no"
    [[ $minutes =~ ^[0-9]+(\.[0-9]+)?$ ]] || fail "--minutes=$minutes: a number of minutes"
    [[ $tries =~ ^[1-9][0-9]*$ ]] || fail "--tries=$tries: a number of failures, 1 or more"
    ((${#rest[@]})) || fail 'keep needs a script and its flags after --: keep -- launch/train.py ...'
    require_gcloud
    if [[ -n $dry_run ]]; then
      create
      queued describe --format='value(state.state)'
      vm install
      begin
      run_state
      queued delete --force --quiet
    else
      keep
    fi
    ;;
  state | stop)
    require name zone project
    require_gcloud
    if [[ $action == state ]]; then
      queued describe --format='value(state.state)'
      run_state
    else
      stop
    fi
    ;;
  *) fail "'$action' is not an action: keep, state or stop" ;;
esac

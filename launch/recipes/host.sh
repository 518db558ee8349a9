#!/usr/bin/env bash
# The work on each TPU host. tpu_vm.sh and gke.sh call it there, in the root of the source tree.
#
#   host.sh install                                  a virtual environment, and gcsfuse
#   host.sh mount --bucket=my-bucket                 at ./bucket
#   host.sh stage --from=bucket/data --to=/tmp/data  a copy of the rows on a local disk
#   host.sh start -- launch/train.py ...             in the background, into ~/run.log
#   host.sh state                                    none, running, lost or "ended CODE"
#   host.sh stop                                     SIGTERM: the run saves and ends
set -euo pipefail
here=$(dirname "${BASH_SOURCE[0]}")
source "$here/common.sh"

action=${1:-}
bucket=${RECIPE_BUCKET:-} from='' to=''
read_flags 'bucket from to' "${@:2}"
packages=https://packages.cloud.google.com/apt
key=/usr/share/keyrings/cloud.google.asc

install() {
  # The images have Python 3.10. This project needs 3.11, which uv installs.
  run bash -o pipefail -c 'curl -LsSf https://astral.sh/uv/install.sh | sh'
  run "$HOME/.local/bin/uv" venv --clear --python=3.11 "$HOME/venv"
  run "$HOME/.local/bin/uv" pip install --python="$HOME/venv" -r requirements.txt -e '.[tpu]'
  # jax recommends this for v5e and later: the runtime starts and stops faster.
  run sudo bash -c 'echo always >/sys/kernel/mm/transparent_hugepage/enabled'
  run bash -o pipefail -c "curl -fsS $packages/doc/apt-key.gpg | sudo tee $key >/dev/null"
  run bash -o pipefail -c "echo deb [signed-by=$key] $packages gcsfuse-\$(lsb_release -cs) main |\
 sudo tee /etc/apt/sources.list.d/gcsfuse.list"
  run sudo apt-get update
  run sudo apt-get install --yes gcsfuse
}

mount_bucket() {
  require bucket
  if mountpoint --quiet bucket; then
    echo 'bucket is mounted already' >&2
    return
  fi
  run mkdir -p bucket
  # No cache of metadata: with one, a host would not see a checkpoint that another host has just
  # made, since it remembers the directory as missing or not yet renamed.
  run gcsfuse --implicit-dirs --metadata-cache-ttl-secs=0 --metadata-cache-negative-ttl-secs=0 \
    "$bucket" bucket
}

stage() {
  [[ -n $from && -n $to ]] || fail 'stage needs --from=DIRECTORY and --to=DIRECTORY'
  to=${to%/}  # $to.partial is next to it
  if [[ -d $to ]]; then
    echo "$to exists already" >&2
    return
  fi
  # Rows are read at random through memory maps. Over a network, each page would be a request.
  run mkdir -p "$(dirname "$to")"
  run rm -rf "$to.partial"
  run cp -r "$from" "$to.partial"
  run mv "$to.partial" "$to"
}

start() {
  ((${#rest[@]})) || fail 'start needs a script and its flags after --'
  local pid_file=$HOME/run.pid variables
  if [[ -e $pid_file ]] && kill -0 "$(<"$pid_file")" 2>/dev/null; then
    fail "process $(<"$pid_file") is still running, and a chip takes one process: stop it first"
  fi
  mapfile -t variables < <(grep --extended-regexp '^[A-Z]' "$here/tpu.env")
  # The code of the process is kept, for `state`. Nothing may hold the terminal of ssh.
  run rm -f "$HOME/run.code"
  run bash -c "($(quote env "${variables[@]}" nohup "$HOME/venv/bin/python" "${rest[@]}") \
>$HOME/run.log 2>&1 </dev/null & echo \$! >$pid_file; wait \$!; echo \$? >$HOME/run.code) \
>/dev/null 2>&1 </dev/null &"
}

state() {
  local pid_file=$HOME/run.pid
  if [[ ! -e $pid_file ]]; then
    echo none
  elif kill -0 "$(<"$pid_file")" 2>/dev/null; then
    echo running
  elif [[ -e $HOME/run.code ]]; then
    echo "ended $(<"$HOME/run.code")"
  else
    echo lost
  fi
}

case $action in
  install) install ;;
  mount) mount_bucket ;;
  stage) stage ;;
  start) start ;;
  state) state ;;
  stop) run bash -c "kill \$(cat $HOME/run.pid)" ;;
  *) fail "'$action' is not an action: install, mount, stage, start, state or stop" ;;
esac

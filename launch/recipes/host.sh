#!/usr/bin/env bash
# The work on each TPU host. tpu_vm.sh and babysit.sh call it there, in the root of the source tree.
#
#   host.sh install                       a virtual environment
#   host.sh start -- launch/train.py ...  in the background, into ~/run.log
#   host.sh state                         none, running, lost or "ended CODE"
#   host.sh stop                          SIGTERM: the run saves and ends
set -euo pipefail
here=$(dirname "${BASH_SOURCE[0]}")
source "$here/common.sh"

action=${1:-}
read_flags '' "${@:2}"

install() {
  run rm -f "$HOME/installed"
  # The images have Python 3.10. This project needs 3.11, which uv installs.
  run bash -o pipefail -c 'curl -LsSf https://astral.sh/uv/install.sh | sh'
  run "$HOME/.local/bin/uv" venv --clear --python=3.11 "$HOME/venv"
  run "$HOME/.local/bin/uv" pip install --python="$HOME/venv" -r requirements.txt -e '.[tpu,buckets]'
  # jax recommends this for v5e and later: the runtime starts and stops faster.
  run sudo bash -c 'echo always >/sys/kernel/mm/transparent_hugepage/enabled'
  run touch "$HOME/installed" # all of it is done; babysit.sh looks for this
}

start() {
  ((${#rest[@]})) || fail 'start needs a script and its flags after --'
  local pid_file=$HOME/run.pid variables
  if [[ -e $pid_file ]] && kill -0 "$(<"$pid_file")" 2>/dev/null; then
    fail "process $(<"$pid_file") is still running, and a chip takes one process: stop it first"
  fi
  mapfile -t variables < <(grep --extended-regexp '^[A-Z]' "$here/tpu.env")
  # A restarted process does not compile again, which takes minutes for a 2B model. Programs in the
  # cache are run as they are, so it is no place that others can write to.
  variables+=("JAX_COMPILATION_CACHE_DIR=$HOME/.cache/latent_deliberation/compiled")
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
  start) start ;;
  state) state ;;
  stop) run bash -c "kill \$(cat $HOME/run.pid)" ;;
  *) fail "'$action' is not an action: install, start, state or stop" ;;
esac

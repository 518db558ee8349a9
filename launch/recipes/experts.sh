#!/usr/bin/env bash
# Trains an expert for each folder of text, and judges routers on held-out text. The same command
# continues where it was stopped: trained experts are left alone.
#
#   experts.sh train --decoder=gemma3-270m --texts=domains --names=astronomy,law --minutes=45
#   experts.sh evaluate --decoder=gemma3-270m --texts=domains --names=astronomy,law
#   experts.sh all ...                               both
#
# Each folder of --texts has train.jsonl and heldout.jsonl, packed as .gz or not. --names says which
# of them get an expert; the others are text of no expert. Packages and results go to --output. Flags
# after -- are passed to launch/experts.py train, such as -- --config=configs/smollm2_135m.py.
set -euo pipefail
here=$(dirname "${BASH_SOURCE[0]}")
source "$here/common.sh"

# A step writes gigabytes of new memory. In large pages it takes less time.
export GLIBC_TUNABLES=${GLIBC_TUNABLES-glibc.malloc.hugetlb=1}

action=${1:-}
decoder='' texts='' names='' output=runs/experts minutes=45 prompts=64
read_flags 'decoder texts names output minutes prompts' "${@:2}"

# file_of NAME PART: the packed or unpacked file of a text.
file_of() {
  local path
  for path in "$texts/$1/$2.jsonl" "$texts/$1/$2.jsonl.gz"; do
    [[ ! -f $path ]] || { echo "$path"; return; }
  done
  fail "$texts/$1 has no $2.jsonl or $2.jsonl.gz"
}

train() {
  local name other text general
  for name in ${names//,/ }; do
    if [[ -f $output/$name/expert.json ]]; then
      echo "$output/$name is there already" >&2
      continue
    fi
    text=$(file_of "$name" train)
    # Harm is measured, and routers are fitted, on the text of all other domains.
    general=''
    for other in "$texts"/*/; do
      other=$(basename "$other")
      [[ $other == "$name" ]] || general+=",$(file_of "$other" train)"
    done
    run python launch/experts.py train "${rest[@]}" "--decoder=$decoder" \
      "--text=$text" "--general=${general#,}" "--name=$name" \
      "--minutes=$minutes" "--output=$output/$name" "--workdir=$output/work/$name"
  done
}

evaluate() {
  local name text packages=() domains=()
  for name in ${names//,/ }; do
    packages+=("$output/$name")
  done
  for name in "$texts"/*/; do
    name=$(basename "$name")
    text=$(file_of "$name" heldout)
    domains+=("--domain=$name=$text")
  done
  run python launch/experts.py evaluate "${packages[@]}" "--decoder=$decoder" "${domains[@]}" \
    --domain=code=stdlib "--prompts=$prompts" "--output=$output/routers.json" --overwrite
}

case $action in
  train | evaluate | all) ;;
  *) fail "'$action' is not an action: give train, evaluate or all" ;;
esac
for flag in decoder texts names; do
  [[ -n ${!flag} ]] || fail "--$flag is missing"
done
[[ -d $texts ]] || fail "--texts=$texts is no directory"
[[ $action == evaluate ]] || train
[[ $action == train ]] || evaluate

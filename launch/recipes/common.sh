# For the recipes, which source it: their flags, and commands that are run or only shown.

dry_run=''
rest=()

fail() {
  echo "${0##*/}: $*" >&2
  exit 2
}

# read_flags 'name zone' "$@" gives the value of --name=... to the variable `name`, and so on; what
# stands behind -- is left in `rest`. The scripts have filled the variables from the environment.
read_flags() {
  local known=$1 flag
  shift
  while (($#)); do
    case $1 in
      --dry_run) dry_run=yes ;;
      --)
        rest=("${@:2}")
        return
        ;;
      --*=*)
        flag=${1%%=*}
        flag=${flag#--}
        [[ $flag != *' '* && " $known " == *" $flag "* ]] || fail "--$flag is not a flag; those are: $known dry_run"
        printf -v "$flag" '%s' "${1#*=}"
        ;;
      *)
        fail "$1: flags are --name=value, of: $known dry_run; what is to be run stands behind --"
        ;;
    esac
    shift
  done
}

# require zone bucket: both flags, or their variables, have a value.
require() {
  local flag
  for flag; do
    [[ -n ${!flag} ]] || fail "--$flag is missing: give it, or set RECIPE_${flag^^}"
    [[ $flag != bucket || $bucket != *[:/]* ]] || fail "--bucket=$bucket: its name alone, no gs://"
  done
}

# The words as one line that a shell reads as the same words.
quote() {
  local word line=''
  for word; do
    [[ $word =~ ^[A-Za-z0-9_./:=,@%+-]+$ ]] || word=${word@Q}
    line+="${line:+ }$word"
  done
  printf '%s\n' "$line"
}

# Runs a command and says so, or with --dry_run only prints it.
run() {
  if [[ -n $dry_run ]]; then
    quote "$@"
  else
    echo "+ $(quote "$@")" >&2
    "$@"
  fi
}

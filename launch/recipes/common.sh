# Shared by the recipes, which source it: flags, and commands that are run or only printed.

dry_run=''
rest=()

fail() {
  echo "${0##*/}: $*" >&2
  exit 2
}

# read_flags 'name zone' "$@" sets the variable `name` to the value of --name=..., and so on. `rest`
# gets the words after --. The scripts have filled the variables from the environment before.
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
        [[ -n $flag && $flag != *' '* && " $known " == *" $flag "* ]] || fail "--$flag is not a flag; the flags are: $known dry_run"
        printf -v "$flag" '%s' "${1#*=}"
        ;;
      *)
        fail "$1: flags are --name=value, of: $known dry_run; the command to run goes after --"
        ;;
    esac
    shift
  done
}

# require zone bucket: fails unless both flags, or their variables, have a value.
require() {
  local flag
  for flag; do
    [[ -n ${!flag} ]] || fail "--$flag is missing: give it, or set RECIPE_${flag^^}"
    [[ $flag != bucket || $bucket != *[:/]* ]] || fail "--bucket=$bucket: give the name alone, without gs://"
  done
}

# Prints the words as one line, which a shell reads as the same words.
quote() {
  local word line=''
  for word; do
    [[ $word =~ ^[A-Za-z0-9_./:=,@%+-]+$ ]] || word=${word@Q}
    line+="${line:+ }$word"
  done
  printf '%s\n' "$line"
}

# Prints a command and runs it. With --dry_run it only prints it.
run() {
  if [[ -n $dry_run ]]; then
    quote "$@"
  else
    echo "+ $(quote "$@")" >&2
    "$@"
  fi
}

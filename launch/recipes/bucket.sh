#!/usr/bin/env bash
# A bucket for data and runs, and what goes in and out of it.
#
#   bucket.sh create   --bucket=my-bucket --location=us-west4 --project=my-project
#   bucket.sh upload   --bucket=my-bucket --from=runs/data --to=data
#   bucket.sh download --bucket=my-bucket --from=runs/coprocessor --to=runs/coprocessor
#
# --dry_run prints the commands. A flag that is not given is taken from RECIPE_BUCKET, and so on.
# Make the rows with launch/prepare.py first, on a machine with seqio, and upload its --workdir; a
# decoder is uploaded as the directory that it is.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

action=${1:-}
bucket=${RECIPE_BUCKET:-} location=${RECIPE_LOCATION:-} project=${RECIPE_PROJECT:-} from='' to=''
read_flags 'bucket location project from to' "${@:2}"

case $action in
  create)
    require bucket location project
    # With a hierarchical namespace a directory is renamed in one step, which is how a checkpoint,
    # a decoder or a coprocessor becomes whole. In a flat bucket every file would be copied.
    run gcloud storage buckets create "gs://$bucket" --project="$project" --location="$location" \
      --uniform-bucket-level-access --enable-hierarchical-namespace
    ;;
  upload)
    require bucket
    [[ -n $from && -n $to ]] || fail 'upload needs --from=DIRECTORY and --to=PATH_IN_THE_BUCKET'
    run gcloud storage rsync --recursive "$from" "gs://$bucket/$to"
    ;;
  download)
    require bucket
    [[ -n $from && -n $to ]] || fail 'download needs --from=PATH_IN_THE_BUCKET and --to=DIRECTORY'
    run mkdir -p "$to"
    run gcloud storage rsync --recursive "gs://$bucket/$from" "$to"
    ;;
  *) fail "'$action' is not an action: create, upload or download" ;;
esac

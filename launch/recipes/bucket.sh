#!/usr/bin/env bash
# Makes a bucket for data and runs, and copies files to it and from it.
#
#   bucket.sh create   --bucket=my-bucket --location=us-west4 --project=my-project
#   bucket.sh upload   --bucket=my-bucket --from=runs/data --to=data
#   bucket.sh download --bucket=my-bucket --from=runs/coprocessor --to=runs/coprocessor
#
# --dry_run prints the commands. The default of --bucket is RECIPE_BUCKET, and so on. First make the
# rows with launch/prepare.py, on a machine with seqio, and upload its --workdir; or let it write them
# to --workdir=gs://my-bucket/data. Upload a decoder as its directory.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

action=${1:-}
bucket=${RECIPE_BUCKET:-} location=${RECIPE_LOCATION:-} project=${RECIPE_PROJECT:-} from='' to=''
read_flags 'bucket location project from to' "${@:2}"

case $action in
  create)
    require bucket location project
    # A flat namespace will do: runs rename no directory in a bucket.
    run gcloud storage buckets create "gs://$bucket" --project="$project" --location="$location" \
      --uniform-bucket-level-access
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

#!/usr/bin/env bash
# Cloud TPU VMs, by queued resources: from nothing to a running job, and back.
set -euo pipefail

usage() {
  cat <<'END'
usage: tpu/vm.sh COMMAND [OPTION...] [ARGUMENT...]

  bucket gs://NAME          make a bucket in the zone's region that the TPU VMs may write to
  create [-- GCLOUD...]     ask for the slice and wait until it is there; the rest goes to gcloud as it is
  setup                     copy the committed code to every worker and install what it needs; again after each change
  smoke [--bucket gs://B]   devices, a collective, storage, one training step: on every worker, in a minute
  run ARGUMENT...           start `python -m mapo_jax.train ARGUMENT...` on every worker, in the background
  babysit ARGUMENT...       `run`, and see to it until it is done: a slice that was taken away is asked for again
  status                    the slice's state, and every worker's
  logs [--worker N|all]     follow the log (default: worker 0)
  stop                      ask the run to save and end, on every worker; the slice stays, and goes on costing money
  delete                    give the slice back
  ssh COMMAND               run a command on every worker

  --name NAME        of the slice (TPU_NAME)
  --type TYPE        of the slice, such as v6e-8, v5litepod-16, v5p-64 (TPU_TYPE)
  --zone ZONE        such as us-east5-b (TPU_ZONE)
  --project PROJECT  (TPU_PROJECT)
  --spot             much cheaper, may be taken away at any time (create, babysit)
  --reserved         from your reservation (create, babysit)
  --wait MINUTES     how long create waits for the slice (default 1440)
  --restarts N       most times that babysit tries again on one slice, or for one (default 20)
  --dry-run          print the commands, and run none
  -h, --help

Options come before the command's own arguments; what has a name in brackets can be set in the environment.
END
}

here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=lib.sh source-path=SCRIPTDIR
. "$here/tpu/lib.sh"

name=${TPU_NAME:-} slice=${TPU_TYPE:-} zone=${TPU_ZONE:-} project=${TPU_PROJECT:-}
tier=() wait_minutes=1440 worker=0 bucket="" restarts=20
poll_seconds=${TPU_POLL_SECONDS:-30}

# --- gcloud. ---

tpus() { # GROUP COMMAND WHAT ARGUMENT...
  run gcloud compute tpus "$1" "$2" "$3" "--zone=$zone" "--project=$project" "${@:4}"
}

on_workers() { # WORKER COMMAND
  tpus tpu-vm ssh "$name" "--worker=$1" "--command=$2"
}

state() { # of the queued resource: WAITING_FOR_RESOURCES, PROVISIONING, ACTIVE, SUSPENDED, FAILED, ...; empty: none
  tpus queued-resources describe "$name" "--format=value(state.state)" 2>/dev/null || true
}

check_place() {
  need_gcloud
  check_project
  check_zone
}

check_slice_name() {
  check_place
  check_name name "$name" "--name NAME or set TPU_NAME"
}

check_slice() {
  check_slice_name
  check_type
}

runtime() { # the machine image for a generation (cloud.google.com/tpu/docs/runtimes)
  case $(generation "$slice") in
    v6e) echo v2-alpha-tpuv6e ;;
    v5p) echo v2-alpha-tpuv5 ;;
    v5e) echo v2-alpha-tpuv5-lite ;;
    v4) echo tpu-ubuntu2204-base ;;
    *) die "a $slice slice is to be had through GKE only; use tpu/gke.sh" ;;
  esac
}

# --- Commands. ---

bucket() {
  check_place
  [ $# -eq 1 ] || die "name one bucket: tpu/vm.sh bucket gs://NAME"
  check_bucket "$1"
  run gcloud storage buckets create "$1" "--project=$project" "--location=$(region)" --uniform-bucket-level-access
  local number=PROJECT_NUMBER # TPU VMs act as the project's default service account
  local ask=(gcloud projects describe "$project" "--format=value(projectNumber)")
  if [ "$dry_run" = yes ]; then quoted "${ask[@]}"; else number=$("${ask[@]}"); fi
  run gcloud storage buckets add-iam-policy-binding "$1" --role=roles/storage.objectAdmin \
    "--member=serviceAccount:$number-compute@developer.gserviceaccount.com"
}

create() {
  check_slice
  local image found
  image=$(runtime) || exit 2
  if [ "$dry_run" = no ]; then
    found=$(state)
    [ -z "$found" ] || die "$name exists already in $zone and is $found; delete it first, or choose another --name"
    tpus tpu-vm accelerator-types describe "$slice" "--format=value(type)" >/dev/null 2>&1 ||
      die "there is no $slice in $zone for project $project (or gcloud is not signed in); see: gcloud compute tpus tpu-vm accelerator-types list --zone=$zone --project=$project"
  else
    quoted gcloud compute tpus tpu-vm accelerator-types describe "$slice" "--zone=$zone" "--project=$project"
  fi
  tpus queued-resources create "$name" "--node-id=$name" "--accelerator-type=$slice" "--runtime-version=$image" \
    "${tier[@]}" "$@"
  await
}

await() { # until the slice is there
  if [ "$dry_run" = yes ]; then
    state
    return
  fi
  local since=$SECONDS now last=""
  while true; do
    now=$(state)
    [ "$now" = "$last" ] || say "$name: ${now:-gone}"
    last=$now
    case $now in
      ACTIVE) return ;;
      FAILED | SUSPENDED | SUSPENDING)
        die "$name is $now and will not come; see: gcloud compute tpus queued-resources describe $name --zone=$zone --project=$project; then tpu/vm.sh delete" ;;
    esac
    [ $((SECONDS - since)) -lt $((60 * wait_minutes)) ] ||
      die "$name is not there after $wait_minutes minutes; it stays in the queue: tpu/vm.sh status, or delete it"
    sleep "$poll_seconds"
  done
}

setup() {
  check_slice_name
  local archive=mapo_jax.tar.gz folder
  git -C "$here" rev-parse --verify -q HEAD >/dev/null || die "$here is no git checkout; setup sends what is committed"
  [ -z "$(git -C "$here" status --porcelain --untracked-files=no)" ] ||
    say "note: uncommitted changes in $here do not go along"
  folder=$(mktemp -d)
  # shellcheck disable=SC2064 # the folder as it is now
  trap "rm -rf '$folder'" EXIT
  run git -C "$here" archive --format=tar.gz "--output=$folder/$archive" HEAD
  tpus tpu-vm scp "$folder/$archive" "$name:$archive" --worker=all
  on_workers all "rm -rf mapo_new && mkdir mapo_new && tar -xzf $archive -C mapo_new && bash mapo_new/tpu/worker.sh setup"
}

smoke() {
  check_slice_name
  if [ -n "$bucket" ]; then check_bucket "$bucket"; fi
  on_workers all "cd mapo_jax && ../mapo_venv/bin/python tpu/smoke.py${bucket:+ --storage $bucket/smoke}"
}

start() {
  check_slice
  check_run "$@"
  on_workers all "$(quoted bash mapo_jax/tpu/worker.sh start "$slice" "$@")"
}

how_it_stands="bash mapo_jax/tpu/worker.sh status 2>/dev/null || echo bare" # bare: nothing is installed yet

again() { # COMMAND ARGUMENT...: one of the commands above, in a process of its own that may fail
  bash "$here/tpu/vm.sh" "$1" --name "$name" --type "$slice" --zone "$zone" --project "$project" "${tier[@]}" \
    --wait "$wait_minutes" "${@:2}"
}

babysit() {
  check_slice
  check_run "$@"
  if [ "$dry_run" = yes ]; then
    state
    on_workers 0 "$how_it_stands"
    again create --dry-run
    again setup --dry-run
    again run --dry-run "$@"
    return
  fi
  local found said tries=0
  while [ "$tries" -le "$restarts" ]; do
    found=$(state)
    said=""
    if [ "$found" = ACTIVE ]; then # no answer: the slice is about to go; look again
      said=$(on_workers 0 "$how_it_stands" 2>/dev/null | tail -n 1) || said=""
    fi
    case "$found $said" in
      " " | SUSPENDED* | FAILED*)
        say "$name is ${found:-not there}; asking for it"
        [ -z "$found" ] || again delete || true
        if again create && again setup && again run "$@"; then tries=0; else tries=$((tries + 1)); fi
        ;;
      "ACTIVE bare") { again setup && again run "$@"; } || tries=$((tries + 1)) ;;
      "ACTIVE none") again run "$@" || tries=$((tries + 1)) ;;
      "ACTIVE ended 0")
        say "$name: the run is done; the slice is still there: tpu/vm.sh delete"
        return
        ;;
      "ACTIVE ended 124")
        say "$name: the run is saved and stopped at its deadline; the slice is still there: tpu/vm.sh delete"
        return
        ;;
      "ACTIVE ended 2") die "the run refuses its input, and would again; see tpu/vm.sh logs" ;;
      "ACTIVE ended"*)
        tries=$((tries + 1))
        say "$name: the run $said; starting it again ($tries of $restarts)"
        again stop || true # of the workers that have not noticed yet
        again run "$@" || true
        ;;
    esac
    sleep "$poll_seconds"
  done
  die "gave up after $restarts more tries; see tpu/vm.sh logs and tpu/vm.sh status"
}

status() {
  check_slice_name
  state
  on_workers all "bash mapo_jax/tpu/worker.sh status"
}

delete() {
  check_slice_name
  tpus queued-resources delete "$name" --force --quiet
}

main() {
  local command=${1:-}
  [ $# -gt 0 ] && shift
  case $command in -h | --help) usage && return ;; esac
  while [ $# -gt 0 ]; do
    case $1 in
      --name) need_value "$@" && name=$2 && shift ;;
      --type) need_value "$@" && slice=$2 && shift ;;
      --zone) need_value "$@" && zone=$2 && shift ;;
      --project) need_value "$@" && project=$2 && shift ;;
      --spot | --reserved) tier=("$1") ;;
      --wait) need_value "$@" && wait_minutes=$2 && shift ;;
      --restarts) need_value "$@" && restarts=$2 && shift ;;
      --worker) need_value "$@" && worker=$2 && shift ;;
      --bucket) need_value "$@" && bucket=$2 && shift ;;
      --dry-run) dry_run=yes ;;
      -h | --help) usage && return ;;
      --)
        shift
        break
        ;;
      *) break ;;
    esac
    shift
  done
  [[ $wait_minutes =~ ^[0-9]+$ ]] || die "--wait is '$wait_minutes'; it must be whole minutes"
  [[ $restarts =~ ^[0-9]+$ ]] || die "--restarts is '$restarts'; it must be a whole number"
  [[ $worker =~ ^([0-9]+|all)$ ]] || die "--worker is '$worker'; it must be a worker's number, or all"
  case $command in
    bucket) bucket "$@" ;;
    create) create "$@" ;;
    setup) setup ;;
    smoke) smoke ;;
    run) start "$@" ;;
    babysit) babysit "$@" ;;
    status) status ;;
    logs)
      check_slice_name
      on_workers "$worker" "bash mapo_jax/tpu/worker.sh logs"
      ;;
    stop)
      check_slice_name
      on_workers all "bash mapo_jax/tpu/worker.sh stop"
      ;;
    delete) delete ;;
    ssh)
      check_slice_name
      [ $# -eq 1 ] || die "give the command as one word: tpu/vm.sh ssh 'df -h'"
      on_workers all "$1"
      ;;
    "") die "no command; see --help" ;;
    *) die "unknown command '$command'; see --help" ;;
  esac
}

main "$@"

#!/usr/bin/env bash
# Creates Cloud TPU VMs (queued resources), runs a job on them, and deletes them.
set -euo pipefail

usage() {
  cat <<'END'
usage: tpu/vm.sh COMMAND [OPTION...] [ARGUMENT...]

  bucket gs://NAME          create a bucket in the zone's region, with write permission for the TPU VMs
  create [-- GCLOUD...]     request the slice and wait for it; the rest is passed to gcloud
  setup                     copy the committed code to every worker and install packages; repeat after each commit
  smoke [--bucket gs://B]   devices, a collective, storage, one training step: on every worker, in a minute
  run ARGUMENT...           start `python -m mapo_jax.train ARGUMENT...` on every worker, in the background
  babysit ARGUMENT...       `run`, and monitor it until it is done; requests the slice again after a preemption
  status                    the state of the slice and of every worker
  logs [--worker N|all]     follow the log (default: worker 0)
  stop                      let the run save and end, on every worker; the slice stays and still costs money
  delete                    delete the slice
  ssh COMMAND               run a command on every worker

  --name NAME        of the slice (TPU_NAME)
  --type TYPE        of the slice, such as v6e-8, v5litepod-16, v5p-64 (TPU_TYPE)
  --zone ZONE        such as us-east5-b (TPU_ZONE)
  --project PROJECT  (TPU_PROJECT)
  --spot             spot capacity: much cheaper, may be preempted at any time (create, babysit)
  --reserved         use your reservation (create, babysit)
  --wait MINUTES     how long create waits for the slice (default 1440)
  --restarts N       how often babysit retries a run on one slice, or the request for one (default 20)
  --dry-run          print the commands, and run none
  -h, --help

Options come before the command's arguments. A name in brackets is the environment variable of the option.
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
    *) die "$slice slices are available only through GKE; use tpu/gke.sh" ;;
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
  local image current
  image=$(runtime) || exit 2
  if [ "$dry_run" = no ]; then
    current=$(state)
    [ -z "$current" ] || die "$name exists already in $zone and is $current; delete it first, or choose another --name"
    tpus tpu-vm accelerator-types describe "$slice" "--format=value(type)" >/dev/null 2>&1 ||
      die "there is no $slice in $zone for project $project (or gcloud is not signed in); see: gcloud compute tpus tpu-vm accelerator-types list --zone=$zone --project=$project"
  else
    quoted gcloud compute tpus tpu-vm accelerator-types describe "$slice" "--zone=$zone" "--project=$project"
  fi
  tpus queued-resources create "$name" "--node-id=$name" "--accelerator-type=$slice" "--runtime-version=$image" \
    "${tier[@]}" "$@"
  await
}

await() { # waits until the slice is active
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
        die "$name is $now and will not become active; see: gcloud compute tpus queued-resources describe $name --zone=$zone --project=$project; then tpu/vm.sh delete" ;;
    esac
    [ $((SECONDS - since)) -lt $((60 * wait_minutes)) ] ||
      die "$name is not there after $wait_minutes minutes; it stays in the queue: tpu/vm.sh status, or delete it"
    sleep "$poll_seconds"
  done
}

setup() {
  check_slice_name
  local archive=mapo_jax.tar.gz folder
  git -C "$here" rev-parse --verify -q HEAD >/dev/null || die "$here is no git checkout; setup sends the committed code"
  [ -z "$(git -C "$here" status --porcelain --untracked-files=no)" ] ||
    say "note: uncommitted changes in $here are not sent"
  folder=$(mktemp -d)
  # shellcheck disable=SC2064 # expand the folder now
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

run_status="bash mapo_jax/tpu/worker.sh status 2>/dev/null || echo bare" # bare: the code is not installed yet

again() { # COMMAND ARGUMENT...: one of the commands above, in a separate process that may fail
  bash "$here/tpu/vm.sh" "$1" --name "$name" --type "$slice" --zone "$zone" --project "$project" "${tier[@]}" \
    --wait "$wait_minutes" "${@:2}"
}

babysit() {
  check_slice
  check_run "$@"
  if [ "$dry_run" = yes ]; then
    state
    on_workers 0 "$run_status"
    again create --dry-run
    again setup --dry-run
    again run --dry-run "$@"
    return
  fi
  local current status tries=0
  while [ "$tries" -le "$restarts" ]; do
    current=$(state)
    status=""
    if [ "$current" = ACTIVE ]; then # no answer: the slice is about to be removed; check again later
      status=$(on_workers 0 "$run_status" 2>/dev/null | tail -n 1) || status=""
    fi
    case "$current $status" in
      " " | SUSPENDED* | FAILED*)
        say "$name is ${current:-not there}; asking for it"
        [ -z "$current" ] || again delete || true
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
        say "$name: the run $status; starting it again ($tries of $restarts)"
        again stop || true # on workers that have not noticed it yet
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

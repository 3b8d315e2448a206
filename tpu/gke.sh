#!/usr/bin/env bash
# Runs jobs on Google Kubernetes Engine with xpk (github.com/AI-Hypercomputer/xpk): a cluster, an image, jobs.
set -euo pipefail

usage() {
  cat <<'END'
usage: tpu/gke.sh COMMAND [OPTION...] [ARGUMENT...]

  create                    create a cluster with one slice (takes minutes; costs money until it is deleted)
  image                     build tpu/Dockerfile and push the image; repeat after each change
  run ARGUMENT...           submit `python -m mapo_jax.train ARGUMENT...` as a job, restarted after each preemption
  status                    list the cluster's jobs
  logs                      follow the log of the job's pods
  stop                      let the job save and end, and remove it from the cluster
  delete                    delete the cluster

  --name NAME        of the cluster (TPU_NAME)
  --type TYPE        of the slice, such as v6e-16, v5p-64, tpu7x-16 (TPU_TYPE)
  --zone ZONE        such as us-east5-b (TPU_ZONE)
  --project PROJECT  (TPU_PROJECT)
  --image IMAGE      such as us-east5-docker.pkg.dev/PROJECT/mapo/mapo_jax:1 (TPU_IMAGE)
  --job NAME         of the job (TPU_JOB, default mapo)
  --spot | --on-demand | --reservation NAME     kind of capacity (create; one is required)
  --restarts N       how often a job may be restarted (default 50)
  --grace SECONDS    time to save, from the signal to the end of a pod (default 300)
  --dry-run          print the commands, and run none
  -h, --help

Options come before the command's arguments. A name in brackets is the environment variable of the option.
Needs xpk (pip install xpk), gcloud and kubectl; docker for `image`.
END
}

here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=lib.sh source-path=SCRIPTDIR
. "$here/tpu/lib.sh"

name=${TPU_NAME:-} slice=${TPU_TYPE:-} zone=${TPU_ZONE:-} project=${TPU_PROJECT:-}
image=${TPU_IMAGE:-} job=${TPU_JOB:-mapo} tier=() restarts=50 grace=300

xpk_command() { # GROUP COMMAND ARGUMENT...
  run xpk "$1" "$2" "--cluster=$name" "--zone=$zone" "--project=$project" "${@:3}"
}

check_cluster() {
  need_gcloud
  need_program xpk "pip install xpk"
  check_project
  check_zone
  check_name name "$name" "--name NAME or set TPU_NAME"
}

check_image() {
  [ -n "$image" ] || die "no image; give --image IMAGE or set TPU_IMAGE"
  [[ $image =~ ^[a-z0-9.-]+/[a-z0-9._/-]+(:[A-Za-z0-9._-]+)?$ ]] ||
    die "image '$image' is no image; write it as $(region)-docker.pkg.dev/$project/REPOSITORY/mapo_jax:TAG"
}

create() {
  check_cluster
  check_type
  [ ${#tier[@]} -eq 1 ] || die "no kind of capacity; give one of --spot, --on-demand, --reservation NAME"
  xpk_command cluster create "--tpu-type=$slice" --num-slices=1 "${tier[@]}"
}

build() {
  need_program docker "see docs.docker.com/get-docker"
  check_image
  run docker build "--file=$here/tpu/Dockerfile" "--tag=$image" "$here"
  run docker push "$image"
}

submit() {
  check_cluster
  check_type
  check_image
  check_name job "$job" "--job NAME or set TPU_JOB"
  check_run "$@"
  # xpk restarts a job after exit statuses 42 and 127 to 255; a run that has saved on SIGTERM ends with 143.
  # We add 3: the run ended because another worker failed. Status 2, bad input, is not restarted.
  xpk_command workload create "--workload=$job" "--tpu-type=$slice" --num-slices=1 "--docker-image=$image" \
    "--max-restarts=$restarts" --restart-on-exit-codes=3 "--termination-grace-period-seconds=$grace" \
    "--command=$(quoted bash tpu/worker.sh exec "$slice" "$@")"
}

logs() {
  check_cluster
  need_program kubectl "gcloud components install kubectl"
  run gcloud container clusters get-credentials "$name" "--location=$(region)" "--project=$project"
  run kubectl logs --follow --prefix --max-log-requests=64 --tail=100 "--selector=jobset.sigs.k8s.io/jobset-name=$job"
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
      --image) need_value "$@" && image=$2 && shift ;;
      --job) need_value "$@" && job=$2 && shift ;;
      --spot | --on-demand) tier+=("$1") ;;
      --reservation) need_value "$@" && tier+=("--reservation=$2") && shift ;;
      --restarts) need_value "$@" && restarts=$2 && shift ;;
      --grace) need_value "$@" && grace=$2 && shift ;;
      --dry-run) dry_run=yes ;;
      -h | --help) usage && return ;;
      *) break ;;
    esac
    shift
  done
  [[ $restarts =~ ^[0-9]+$ ]] || die "--restarts is '$restarts'; it must be a whole number"
  [[ $grace =~ ^[0-9]+$ ]] || die "--grace is '$grace'; it must be whole seconds"
  case $command in
    create) create ;;
    image) build ;;
    run) submit "$@" ;;
    status) check_cluster && xpk_command workload list ;;
    logs) logs ;;
    stop) check_cluster && xpk_command workload delete "--workload=$job" --force ;;
    delete) check_cluster && xpk_command cluster delete --force ;;
    "") die "no command; see --help" ;;
    *) die "unknown command '$command'; see --help" ;;
  esac
}

main "$@"

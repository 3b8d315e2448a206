# shellcheck shell=bash
# Shared by vm.sh, gke.sh and worker.sh: messages, checks of names, and running or printing a command.

dry_run=no # `yes` with --dry-run: `run` only prints

die() { # prints an error message and exits with status 2
  printf 'error: %s\n' "$*" >&2
  exit 2
}

say() { printf '%s\n' "$*" >&2; }

need_program() { # NAME REMEDY
  command -v "$1" >/dev/null || die "$1 is not installed or not on PATH; $2"
}

need_gcloud() { need_program gcloud "see cloud.google.com/sdk/docs/install"; }

quoted() { # the words as one line, quoted for a shell
  local word line=""
  for word in "$@"; do
    [[ $word =~ ^[A-Za-z0-9_./:=@,+%-]+$ ]] || word=${word@Q}
    line+="${line:+ }$word"
  done
  printf '%s\n' "$line"
}

run() { # runs the command, or prints it with --dry-run
  if [ "$dry_run" = yes ]; then quoted "$@"; else "$@"; fi
}

need_value() { # OPTION [VALUE]
  [ $# -ge 2 ] && [ -n "$2" ] || die "$1 needs a value; see --help"
}

check_name() { # WHAT NAME
  [ -n "$2" ] || die "no $1; give $3"
  [[ $2 =~ ^[a-z]([a-z0-9-]{0,38}[a-z0-9])?$ ]] ||
    die "$1 '$2' must be at most 40 lower-case letters, digits and hyphens, beginning with a letter"
}

check_project() {
  [ -n "$project" ] || die "no project; give --project PROJECT or set TPU_PROJECT"
  [[ $project =~ ^([a-z0-9.-]+:)?[a-z][a-z0-9-]{4,28}[a-z0-9]$ ]] ||
    die "project '$project' is no project ID: 6 to 30 lower-case letters, digits and hyphens (not the project's title or number)"
}

check_zone() {
  [ -n "$zone" ] || die "no zone; give --zone ZONE or set TPU_ZONE, such as us-east5-b"
  [[ $zone =~ ^[a-z]+-[a-z]+[0-9]+-([a-z]|ai[0-9]+[a-z]?)$ ]] ||
    die "zone '$zone' is no zone; zones look like us-east5-b (us-east5 alone is a region)"
}

region() { printf '%s' "${zone%-*}"; }

check_run() { # ARGUMENT...: run.directory must be in a bucket
  local argument directory=""
  for argument in "$@"; do
    case $argument in run.directory=*) directory=${argument#*=} ;; esac
  done
  [[ $directory == gs://* ]] ||
    die "the run must lie in a bucket, so that every worker can write it and it outlives the machines; add run.directory=gs://BUCKET/runs/NAME"
}

check_bucket() { # BUCKET
  [[ $1 =~ ^gs://[a-z0-9][a-z0-9._-]{1,61}[a-z0-9]$ ]] ||
    die "'$1' is no bucket; write gs://NAME, with 3 to 63 lower-case letters, digits, hyphens, dots and underscores"
}

# --- Slices. The number counts chips (v5litepod, v6e, tpu7x) or cores, two per chip (v4, v5p). ---

generation() { # TYPE: v4, v5e, v5p, v6e, tpu7x; fails for anything else
  case $1 in
    v4-*) echo v4 ;;
    v5litepod-*) echo v5e ;;
    v5p-*) echo v5p ;;
    v6e-*) echo v6e ;;
    tpu7x-*) echo tpu7x ;;
    *) return 1 ;;
  esac
}

check_type() {
  local size=${slice#*-}
  [ -n "$slice" ] || die "no slice; give --type TYPE or set TPU_TYPE, such as v6e-8"
  case $slice in
    v5e-*) die "slice '$slice' is called v5litepod-$size" ;;
    v6e-* | v5litepod-*)
      [[ " 1 4 8 16 32 64 128 256 " == *" $size "* ]] ||
        die "there is no slice '$slice'; a ${slice%%-*} slice has 1, 4, 8, 16, 32, 64, 128 or 256 chips"
      ;;
    v4-* | v5p-*)
      [[ $size =~ ^[0-9]+$ ]] && [ "$size" -ge 8 ] && [ $((size % 8)) -eq 0 ] ||
        die "there is no slice '$slice'; the number of a ${slice%%-*} slice counts cores, two per chip: 8, 16, 32, ..."
      ;;
    tpu7x-*) [[ $size =~ ^[0-9]+(x[0-9]+x[0-9]+)?$ ]] ||
      die "there is no slice '$slice'; write tpu7x-CHIPS or a topology such as tpu7x-2x2x1" ;;
    *) die "there is no slice '$slice'; slices are v5litepod-N, v6e-N (N chips), v4-N, v5p-N (N cores) and tpu7x-N" ;;
  esac
}

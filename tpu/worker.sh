#!/usr/bin/env bash
# On a worker: starts the run in the background, prints its status, shows its log, stops it.
set -euo pipefail

usage() {
  cat <<'END'
usage: worker.sh [--dry-run] COMMAND [...]      vm.sh calls it on every worker; containers of gke.sh use `exec`

  setup                    replace ~/mapo_jax by this copy of the code and install packages
  start TYPE ARGUMENT...   python -m mapo_jax.train ARGUMENT... in the background, with the compiler flags of TYPE;
                           refused while a run is active
  exec TYPE ARGUMENT...    the same in the foreground; signals go to the run
  status                   one line: `running`, `ended N` (N is the exit status), or `none`
  logs [LINES]             the end of the log (default 100 lines), then new lines as they come
  stop [SECONDS]           let the run save and end (SIGTERM), and wait for it (default 600 s)

  --dry-run                print the commands, and run none

The run's log, process number and exit status are in $MAPO_STATE (default ~/mapo_state). Python is $MAPO_PYTHON, by
default the one that setup installs (~/mapo_venv), otherwise python3.
END
}

here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=lib.sh source-path=SCRIPTDIR
. "$here/tpu/lib.sh"
state=${MAPO_STATE:-$HOME/mapo_state}
python=${MAPO_PYTHON:-$HOME/mapo_venv/bin/python}
[ -x "$python" ] || [ -n "${MAPO_PYTHON:-}" ] || python=python3

running() { [ -f "$state/pid" ] && [ ! -f "$state/status" ] && kill -0 "$(cat "$state/pid")" 2>/dev/null; }

train_command() { # TYPE ARGUMENT...: sets `words`
  [ $# -ge 1 ] || die "no slice; see --help"
  local flags
  flags=$(bash "$here/tpu/xla_flags.sh" "$1") || exit 2
  shift
  words=(env "LIBTPU_INIT_ARGS=${flags}${LIBTPU_INIT_ARGS:+ $LIBTPU_INIT_ARGS}" "$python" -u -m mapo_jax.train "$@")
}

setup() {
  running && die "a run is going on on $(hostname) ($(cat "$state/pid")); stop it first"
  cd "$HOME"
  # The TPU images have an older Python than we need; uv installs one. A second setup takes seconds.
  run python3 -m pip install --quiet --user --upgrade uv
  [ -x mapo_venv/bin/python ] || run .local/bin/uv venv --quiet --python 3.12 mapo_venv
  run .local/bin/uv pip install --quiet --python mapo_venv/bin/python -r "$here/requirements-tpu.txt"
  if [ "$here" != "$HOME/mapo_jax" ]; then
    run rm -rf mapo_jax
    run mv "$here" mapo_jax
  fi
  [ "$dry_run" = yes ] || say "$(hostname): ready"
}

start() {
  train_command "$@"
  if [ "$dry_run" = yes ]; then
    quoted "${words[@]}"
    return
  fi
  running && die "a run is going on here ($(cat "$state/pid")); stop it first"
  mkdir -p "$state"
  rm -f "$state/status" "$state/pid"
  cd "$here"
  # A background shell waits for the run and writes its exit status for `status`.
  # shellcheck disable=SC2016 # expanded by the inner shell
  nohup setsid bash -c '
    "$@" </dev/null >>"$0/log" 2>&1 &
    echo $! >"$0/pid"
    code=0
    wait $! || code=$?
    echo "$code" >"$0/status.new" && mv "$0/status.new" "$0/status"
  ' "$state" "${words[@]}" </dev/null >/dev/null 2>&1 &
  for _ in $(seq 50); do
    [ -s "$state/pid" ] && break
    sleep 0.1
  done
  echo "started on $(hostname); log: $state/log"
}

status() {
  if running; then
    echo running
  elif [ -f "$state/status" ]; then
    echo "ended $(cat "$state/status")"
  elif [ -f "$state/pid" ]; then
    echo "ended 137" # killed together with the shell that writes the status
  else
    echo none
  fi
}

stop() {
  local seconds=${1:-600} process
  if [ "$dry_run" = yes ]; then
    quoted kill -TERM "$(cat "$state/pid" 2>/dev/null || echo PROCESS)"
    return
  fi
  running || {
    echo "nothing is running on $(hostname)"
    return
  }
  process=$(cat "$state/pid")
  kill -TERM "$process"
  for _ in $(seq "$((seconds * 5))"); do
    running || break
    sleep 0.2
  done
  running && die "the run on $(hostname) has not ended $seconds s after SIGTERM; it may still be saving: ask again, or kill $process"
  echo "stopped on $(hostname): $(status)"
}

main() {
  if [ "${1:-}" = --dry-run ]; then
    dry_run=yes
    shift
  fi
  local command=${1:-}
  [ $# -gt 0 ] && shift
  case $command in
    setup) setup ;;
    start) start "$@" ;;
    exec)
      train_command "$@"
      cd "$here"
      run exec "${words[@]}"
      ;;
    status) status ;;
    logs)
      [ "$dry_run" = yes ] || [ -f "$state/log" ] || die "no log on $(hostname) yet; start a run first"
      run tail -n "${1:-100}" -F "$state/log"
      ;;
    stop) stop "$@" ;;
    -h | --help) usage ;;
    "") die "no command; see --help" ;;
    *) die "unknown command '$command'; one of setup, start, exec, status, logs, stop" ;;
  esac
}

main "$@"

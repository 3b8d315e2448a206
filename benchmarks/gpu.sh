#!/usr/bin/env bash
# The figures of one NVIDIA GPU, in at most 12 minutes on an H200.
#
#   benchmarks/gpu.sh FOLDER [--tiny] [PART ...]
#
# Runs the parts one after the other, each with a time limit. The output of a part is FOLDER/PART.log, its figures are
# FOLDER/PART.json (of the trainings: FOLDER/PART/.../metrics.jsonl), and FOLDER/summary.tsv gets a line as soon as it is
# over, so what is cut off leaves what it had. The exit status is 1 if a part failed or ran out of time.
#
# Before it: `python benchmarks/missing.py requirements-cuda.txt` lists what the machine lacks. The rollout is compared
# with transformers on the same GPU if torch is installed. For SmolLM2-135M bring its folder:
#   python experiments/smollm2.py --only model --folder runs/smollm2      (a machine with PyPI)
#   SMOLLM2=runs/smollm2/model benchmarks/gpu.sh FOLDER
# PYTHON is the interpreter; empty: python3. `--tiny` runs small forms of the parts anywhere.
set -uo pipefail
[ $# -ge 1 ] && [[ $1 != -* ]] || { sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//p}' "$0"; exit 2; }
folder=$(mkdir -p "$1" && cd "$1" && pwd) || exit 2
shift
tiny=""
[ "${1:-}" = --tiny ] && { tiny=1; shift; }
cd "$(dirname "$0")/.." || exit 2
python=${PYTHON:-python3}
export PYTHONUNBUFFERED=1 XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.92}

limits() { # seconds of each part
  cat <<'PARTS'
smoke 45
update_0.6b 60
update_1.7b 70
update_4b 80
decode_0.6b 50
decode_4b 65
paged_0.6b 40
rollout 90
train 130
smollm2 90
PARTS
}

command_of() { # PART -> the arguments of python, in `words`
  local json=(--json "$folder/$1.json") shape=${1#*_} small=()
  [ -n "$tiny" ] && shape=tiny
  case $1 in
    smoke) words=(tpu/smoke.py --storage "$folder/smoke") ;;
    update_*)
      [ -n "$tiny" ] && small=(--length 256 --updates 1 --matrix 64)
      words=(benchmarks/update.py --shape "$shape" "${small[@]}" "${json[@]}") ;;
    decode_*)
      [ -n "$tiny" ] && small=(--batch 2 --context 64 --cache int8 --blocks 2 --block 4 --copy-gib 0.01)
      words=(benchmarks/decode.py --shape "$shape" "${small[@]}" "${json[@]}") ;;
    paged_*) words=(benchmarks/decode.py --shape "$shape" --cache paged "${json[@]}") ;; # a GPU only
    rollout) words=(benchmarks/rollout.py --reference --rounds "${tiny:-3}" --peers transformers "${json[@]}") ;;
    train)
      [ -n "$tiny" ] && small=(training.steps=1 warmstart.steps=2 warmstart.dialogues=30 warmstart.min_naming_ratio=0
        rollout.scenarios=2 rollout.rollouts=2 rollout.max_turns=2 rollout.min_turns=2 evaluation.scenarios=1
        model.fresh.hidden=32 model.fresh.layers=1)
      words=(-m mapo_jax.train run.directory="$folder/train" warmstart.cache="$folder/warmstart" logging.progress=false
        "${small[@]}") ;;
    smollm2)
      words=(experiments/smollm2.py --folder "$folder/smollm2" --seeds 1 --variants "mapo 0.33" "${json[@]}") ;;
    *) return 1 ;;
  esac
}

known=$(limits | cut -d' ' -f1)
if [ $# -gt 0 ]; then parts=("$@"); else mapfile -t parts <<<"$known"; fi
for part in "${parts[@]}"; do
  command_of "$part" || { echo "gpu.sh: '$part' is no part; there are: ${known//$'\n'/, }" >&2; exit 2; }
done

failed=0
[ -s "$folder/summary.tsv" ] || printf 'part\tresult\tseconds\n' >"$folder/summary.tsv"
for part in "${parts[@]}"; do
  result="done" started=$SECONDS
  if [ "$part" = smollm2 ] && [ ! -d "${SMOLLM2:-}" ]; then
    result="left out: SMOLLM2 is no folder"
  else
    [ "$part" = smollm2 ] && mkdir -p "$folder/smollm2" && ln -sfn "$(realpath "$SMOLLM2")" "$folder/smollm2/model"
    command_of "$part"
    # A training that is interrupted saves what it has.
    timeout --signal=INT --kill-after=20 "$(limits | sed -n "s/^$part //p")" \
      "$python" "${words[@]}" >"$folder/$part.log" 2>&1
    case $? in
      0) ;;
      124 | 137) result="out of time" failed=1 ;;
      *) result="failed: $(grep -v '^ *$' "$folder/$part.log" | tail -n 1 | tr '\t' ' ' | cut -c1-200)" failed=1 ;;
    esac
  fi
  printf '%s\t%s\t%s\n' "$part" "$result" $((SECONDS - started)) | tee -a "$folder/summary.tsv"
done
exit $failed

#!/usr/bin/env bash
# Prints the compiler's flags for a slice, for LIBTPU_INIT_ARGS. worker.sh sets them; see README.md, "Flags".
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
# shellcheck source=lib.sh source-path=SCRIPTDIR
. ./lib.sh

usage="usage: xla_flags.sh TYPE        TYPE is a slice, such as v6e-8"
case ${1:-} in
  -h | --help)
    echo "$usage"
    exit 0
    ;;
  "") die "no slice; $usage" ;;
esac

# Gathers of sharded weights go on while the layer before computes. Documented by JAX (xla_flags) and set by
# MaxText for every generation below; newer compilers have them on by default.
overlap=(
  --xla_enable_async_all_gather=true                            # an all-gather has a start and a done
  --xla_tpu_enable_async_collective_fusion=true                 # what lies between the two is fused with it
  --xla_tpu_enable_async_collective_fusion_fuse_all_gather=true # for all-gathers too
  --xla_tpu_enable_async_collective_fusion_multiple_steps=true  # one gather may stretch over several fusions
  --xla_tpu_overlap_compute_collective_tc=true                  # both run on one TensorCore
)
# The on-chip memory that one operation may use; the rest prefetches for the next. MaxText's value for dense models.
memory=(--xla_tpu_scoped_vmem_limit_kib=98304)

slice=$1
check_type
case $(generation "$slice") in
  v6e) flags=("${overlap[@]}" "${memory[@]}") ;;
  v5e | v5p) flags=("${overlap[@]}") ;;
  *) flags=() ;; # nothing that we could verify: the compiler's defaults
esac
echo "${flags[*]}"

#!/usr/bin/env bash
# Prints the compiler flags of a slice for LIBTPU_INIT_ARGS; worker.sh sets them. See README.md, "The compiler's flags".
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

# Sharded weights are gathered while the previous layer computes. JAX documents these flags (xla_flags), and MaxText
# sets them for every generation below; newer compilers enable them by default.
overlap=(
  --xla_enable_async_all_gather=true                            # an all-gather is started first and waited for later
  --xla_tpu_enable_async_collective_fusion=true                 # operations between the two are fused with it
  --xla_tpu_enable_async_collective_fusion_fuse_all_gather=true # the same for all-gathers
  --xla_tpu_enable_async_collective_fusion_multiple_steps=true  # one gather may span several fusions
  --xla_tpu_overlap_compute_collective_tc=true                  # computation and communication overlap on one core
)
# On-chip memory for one operation; the rest is used to prefetch for the next. MaxText's value for dense models.
memory=(--xla_tpu_scoped_vmem_limit_kib=98304)

slice=$1
check_type
case $(generation "$slice") in
  v6e) flags=("${overlap[@]}" "${memory[@]}") ;;
  v5e | v5p) flags=("${overlap[@]}") ;;
  *) flags=() ;; # no flags that we could verify: the compiler's defaults
esac
echo "${flags[*]}"

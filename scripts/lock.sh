#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Rewrites requirements/constraints.txt: the versions of everything that the requirements pull in,
# for every supported Python. Needs uv (pip install uv). torch pins its own CUDA packages, and
# which of them apply depends on the build, so they are left to it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

files=(requirements/{base,build,ros,sim,datasets,test,bench}.txt)
locked=$(mktemp)
trap 'rm -f "$locked"' EXIT
[ ! -f requirements/constraints.txt ] || cp requirements/constraints.txt "$locked"

direct=()
while read -r name; do
    direct+=(--no-emit-package "$name")
done < <(sed -E 's/[=;#[].*//; /^\s*$/d; s/\s//g' "${files[@]}" | sort -u)

uv pip compile --quiet --universal --python-version 3.10 --no-header --no-annotate \
    "${direct[@]}" --output-file "$locked" "${files[@]}"
{
    echo '# Written by scripts/lock.sh from the requirement files beside this one; not edited by hand.'
    grep -vE "^(#|cuda-|nvidia-|triton|colorama)" "$locked"
} > requirements/constraints.txt

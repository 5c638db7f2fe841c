#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Runs the tests that need Triton: the GPU's kernel, in the interpreter. Triton has a folder of its
# own, so that all other tests run without it, as the package does on a machine without a GPU.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

FOLDER=$PWD/.venv/triton
if [ ! -d "$FOLDER/triton" ]; then
    rm -rf "$FOLDER"
    # shellcheck disable=SC2086  # PIP_ARGS is a list of words
    .venv/bin/python -m pip install --disable-pip-version-check --quiet --no-deps ${PIP_ARGS:-} \
        --target "$FOLDER" --requirement requirements/triton.txt ||
        echo 'test: triton could not be installed' >&2
fi
if [ ! -d "$FOLDER/triton" ]; then
    echo "test: there is no triton for this machine; the tests of its kernel are left out" >&2
    exit 0
fi
export PYTHONPATH=$FOLDER TRITON_INTERPRET=1 OMP_NUM_THREADS=1 PYTEST_DISABLE_PLUGIN_AUTOLOAD=1
exec .venv/bin/pytest test/policy/test_triton_engine.py test/policy/test_inpainting.py \
    test/sim/test_software_rendering.py

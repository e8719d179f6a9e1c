# Sourced on a GPU machine that has torch, transformers and safetensors: installs wheels carried in .whl beside them.
site=$(mktemp -d)
python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target "$site" .whl/*.whl
export PYTHONPATH="$site:." HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1

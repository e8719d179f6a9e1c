# Sourced on a GPU machine that has torch, transformers and safetensors: installs the wheels carried in .whl*.
site=$(mktemp -d)
wheels=$(find .whl* -type f -name '*.whl' 2>/dev/null)
[ -z "$wheels" ] || python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target "$site" $wheels
export PYTHONPATH="$site:." HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1

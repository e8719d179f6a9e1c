"""The vLLM plugin: `quant_method: bitbybit` as one of vLLM's quantization methods. It was never run inside vLLM.

Its loading part is tested against stubs of vLLM's interfaces (tests/core/test_vllm_plugin.py).
"""


def register() -> None:
    """Entry point of the group `vllm.general_plugins`; vLLM calls it in each of its processes, and maybe repeatedly."""
    from vllm.model_executor.layers.quantization import (  # pyright: ignore[reportMissingImports]
        QUANTIZATION_METHODS,
        register_quantization_config,
    )

    from bbb_ao.vllm_plugin.quantization import QUANT_METHOD, PackedConfig

    if QUANT_METHOD not in QUANTIZATION_METHODS:
        register_quantization_config(QUANT_METHOD)(PackedConfig)

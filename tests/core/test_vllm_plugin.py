"""The loading part of the vLLM plugin, against stubs of vLLM's interfaces: vLLM itself has never run it.

The stubs keep what the plugin relies on: the abstract methods, the order of `get_quant_method` and `create_weights` in
a layer's constructor, and how Llama's `load_weights` renames merged layers and calls `parameter.weight_loader`.
"""

import copy
import importlib
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from bbb_ao.convert import gather_inputs
from bbb_ao.errors import ModelError
from bbb_ao.huggingface import quantization_config
from bbb_ao.packed_linear import packed_linears, set_bits
from bbb_ao.passes.fuse_projections import fuse_projections
from core.conftest import TOKENS, packed_llama

MERGED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}


class QuantizationConfig(ABC):
    def __init__(self) -> None:
        self.packed_modules_mapping: dict[str, list[str]] = {}

    @abstractmethod
    def get_name(self) -> str: ...
    @abstractmethod
    def get_supported_act_dtypes(self) -> list[torch.dtype]: ...
    @classmethod
    @abstractmethod
    def get_min_capability(cls) -> int: ...
    @staticmethod
    @abstractmethod
    def get_config_filenames() -> list[str]: ...
    @classmethod
    @abstractmethod
    def from_config(cls, config: dict[str, Any]) -> "QuantizationConfig": ...
    @abstractmethod
    def get_quant_method(self, layer: nn.Module, prefix: str) -> Any: ...


class LinearMethodBase(ABC):
    @abstractmethod
    def create_weights(self, layer: nn.Module, *arguments: Any, **attributes: Any) -> None: ...
    @abstractmethod
    def apply(self, layer: nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor: ...


class UnquantizedLinearMethod(LinearMethodBase):
    def create_weights(self, layer: nn.Module, *arguments: Any, **attributes: Any) -> None: ...
    def apply(self, layer: nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        raise AssertionError("not called here")


class LinearBase(nn.Module):
    def __init__(self, columns: int, rows: list[int], config: Any, prefix: str, bias: bool = False, gpus: int = 1):
        super().__init__()
        self.prefix, self.rows = prefix, rows
        self.quant_method = config.get_quant_method(self, prefix=prefix)
        self.quant_method.create_weights(
            layer=self,
            input_size_per_partition=columns,
            output_partition_sizes=[size // gpus for size in rows],
            input_size=columns,
            output_size=sum(rows),
            params_dtype=torch.float32,
            weight_loader=None,
        )
        self.register_parameter("bias", nn.Parameter(torch.zeros(sum(rows))) if bias else None)
        if self.bias is not None:
            self.bias.weight_loader = self.load_bias

    def load_bias(self, parameter: nn.Parameter, loaded: torch.Tensor, shard: int | str | None = None) -> None:
        place = {"q": 0, "k": 1, "v": 2, None: 0}.get(shard, shard)
        start = sum(self.rows[:place])
        parameter.data[start : start + self.rows[place]].copy_(loaded)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.quant_method.apply(self, x, self.bias)


METHODS: list[str] = ["awq"]
CONFIGS: dict[str, type] = {}


def register_quantization_config(name: str) -> Any:
    def wrap(config: type) -> type:
        if name in METHODS:
            raise ValueError(name)
        assert issubclass(config, QuantizationConfig)
        METHODS.append(name)
        CONFIGS[name] = config
        return config

    return wrap


@pytest.fixture(scope="module")
def config_class() -> Iterator[Any]:
    layers = "vllm.model_executor.layers"
    contents = {
        "vllm": {},
        "vllm.model_executor": {},
        layers: {},
        f"{layers}.linear": {each.__name__: each for each in (LinearBase, LinearMethodBase, UnquantizedLinearMethod)},
        f"{layers}.quantization": {
            "QUANTIZATION_METHODS": METHODS,
            "register_quantization_config": register_quantization_config,
        },
        f"{layers}.quantization.base_config": {"QuantizationConfig": QuantizationConfig},
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, values in contents.items():
            module = ModuleType(name)
            vars(module).update(values)
            patch.setitem(sys.modules, name, module)
        plugin = importlib.import_module("bbb_ao.vllm_plugin")
        plugin.register()
        plugin.register()
        yield CONFIGS["bitbybit"]
    sys.modules.pop("bbb_ao.vllm_plugin.quantization")


def build(config: Any, model: Any, gpus: int = 1) -> dict[str, LinearBase]:
    """vLLM's layers of the first block, filled from the model's state dict as Llama's `load_weights` does."""
    layers = {}
    for name in ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"):
        parent, _, last = name.partition(".")
        block = model.model.layers[0].get_submodule(parent)
        parts = [block.get_submodule(part) for part in MERGED.get(last, [last])]
        rows, bias = [part.out_features for part in parts], parts[0].bias is not None
        layers[name] = LinearBase(parts[0].in_features, rows, config, f"model.layers.0.{name}", bias, gpus)
    parameters = {f"{name}.{key}": p for name, layer in layers.items() for key, p in layer.named_parameters()}
    mapping = [(new, old, place) for new, old, place in (
        (".qkv_proj", ".q_proj", "q"), (".qkv_proj", ".k_proj", "k"), (".qkv_proj", ".v_proj", "v"),
        (".gate_up_proj", ".gate_proj", 0), (".gate_up_proj", ".up_proj", 1),
    )]  # fmt: skip
    loaded = set()
    for key, tensor in model.model.layers[0].state_dict().items():
        if "norm" in key:
            assert key.endswith(".weight"), key
            continue
        for new, old, place in mapping:
            if old in key:
                name = key.replace(old, new)
                parameters[name].weight_loader(parameters[name], tensor, place)
                break
        else:
            name = key
            parameters[name].weight_loader(parameters[name], tensor)
        loaded.add(name)
    assert loaded == set(parameters)
    for layer in layers.values():
        layer.quant_method.process_weights_after_loading(layer)
    return layers


def configured(config_class: Any, model: Any, bits: int | None) -> Any:
    config = config_class.from_config(quantization_config(model).to_dict())
    config.maybe_update_config("model", hf_config=SimpleNamespace(bits=bits))
    config.packed_modules_mapping = MERGED
    return config


@pytest.mark.parametrize("split", [None, 0.5])
@pytest.mark.parametrize("bits", [2, 4, 8, None])
def test_merged_layers_compute_what_their_parts_do(config_class, split: float | None, bits: int | None) -> None:
    model = gather_inputs(copy.deepcopy(packed_llama(split)))
    set_bits(model, bits or 8)
    block = model.model.layers[0]
    for name, layer in build(configured(config_class, model, bits), model).items():
        parent, _, last = name.partition(".")
        parts = [block.get_submodule(parent).get_submodule(part) for part in MERGED.get(last, [last])]
        x = torch.randn(3, parts[0].in_features, generator=torch.Generator().manual_seed(0))
        expected = torch.cat([part(x) for part in parts], -1)
        torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)
        held = [key for key in ("plane_mid", "plane_low") if getattr(layer, key) is not None]
        assert held == ["plane_mid", "plane_low"][: {2: 0, 4: 1}.get(bits, 2)]


def test_quantized_activations_and_bfloat16(config_class) -> None:
    model = gather_inputs(copy.deepcopy(packed_llama(0.5, 4)))
    layer = build(configured(config_class, model, 2), model)["self_attn.qkv_proj"]
    attention = set_bits(model, 2).model.layers[0].self_attn
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    expected = torch.cat([part(x) for part in (attention.q_proj, attention.k_proj, attention.v_proj)], -1)
    assert layer(x).dtype == torch.bfloat16
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("fused", [False, True])
def test_layers_that_gather_for_themselves_are_the_same_model(fused: bool) -> None:
    model = copy.deepcopy(set_bits(packed_llama(), 4))
    with torch.no_grad():
        expected = model(TOKENS).logits
        if fused:
            assert fuse_projections(model).fused
        own = gather_inputs(model)
        torch.testing.assert_close(own(TOKENS).logits, expected, rtol=1e-5, atol=1e-5)
    config = quantization_config(own)
    assert not config.duplicated_outputs
    assert all(shape["index_source"] == f"{name}.ocs_index" for name, shape in config.modules.items())


def test_what_is_not_supported_is_refused_in_one_line(config_class) -> None:
    split = packed_llama()
    with pytest.raises(NotImplementedError, match=r"split channels: .*gather_inputs\(model\) of bbb_ao.convert$"):
        configured(config_class, split, 2)
    model = gather_inputs(copy.deepcopy(split))
    with pytest.raises(NotImplementedError, match=r"qkv_proj: tensor parallelism: expected one GPU, got several"):
        build(configured(config_class, model, 2), model, gpus=2)
    narrow = packed_llama(None, None, 4)
    with pytest.raises(ModelError, match=r"qkv_proj: bits: this layer stores widths 2 to 4, got 8"):
        build(configured(config_class, narrow, 8), narrow)
    config = configured(config_class, model, 2)
    del config.modules["model.layers.0.self_attn.k_proj"]
    with pytest.raises(NotImplementedError, match="expected all of"):
        build(config, model)
    config = configured(config_class, model, 2)
    config.modules["lm_head"] = config.modules["model.layers.0.mlp.down_proj"]
    with pytest.raises(NotImplementedError, match="lm_head: expected a linear layer, got a packed Embedding"):
        config.get_quant_method(nn.Embedding(2, 2), "lm_head")
    assert config.get_quant_method(nn.Embedding(2, 2), "model.embed_tokens") is None
    config.modules["model.layers.0.self_attn.v_proj"]["max_bits"] = 4
    with pytest.raises(NotImplementedError, match="max_bits: expected one for all merged layers"):
        build(config, model)


def test_damaged_tensors_are_named(config_class) -> None:
    model = gather_inputs(copy.deepcopy(packed_llama()))
    layers = packed_linears(model)
    damaged = copy.deepcopy(model)
    packed_linears(damaged)["model.layers.0.self_attn.k_proj"].ocs_index[-1] += 1
    with pytest.raises(NotImplementedError, match=r"qkv_proj.ocs_index: expected equal split channels"):
        build(configured(config_class, model, 2), damaged)
    damaged = copy.deepcopy(model)
    packed_linears(damaged)["model.layers.0.self_attn.o_proj"].scale[0, 0] = 255
    with pytest.raises(ModelError, match=r"o_proj.scale: expected finite values"):
        build(configured(config_class, model, 2), damaged)
    layers["model.layers.0.mlp.up_proj"].plane_high = torch.zeros(1, 1, dtype=torch.uint8)
    with pytest.raises(ModelError, match=r"gate_up_proj.plane_high: expected torch.uint8"):
        build(configured(config_class, model, 2), model)

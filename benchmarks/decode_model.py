"""A Llama with random weights, packed or not, and its greedy decoding loop as two functions without host work.

`Decoder.prefill` and `Decoder.step` read and write tensors that stay in place, so that each can be captured in a CUDA
graph. Both are three compiled functions: the start, one for a number of blocks (which differ in their tensors only; for
the prompt it is one block), the tail. A block ends with the next block's first norm, so that Inductor fuses it with the
sum of the residual stream, as it does when it sees the whole model. Every implementation runs this same loop.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from decode_attention import decode_attention
from torch import Tensor, nn
from transformers import AttentionInterface, AutoModelForCausalLM, LlamaConfig

from bbb_ao.grid import Grid
from bbb_ao.packed_linear import PackedLinear, packed_linears
from bbb_ao.passes import find_blocks, fuse_projections

# impl -> (bits of the blocks' weights, of their activations, of the head); None stays in bfloat16.
IMPLEMENTATIONS: dict[str, tuple[int | None, int | None, int | None]] = {
    "bf16": (None, None, None),
    "w2a16": (2, None, None),
    "w4a16": (4, None, None),
    "w8a16": (8, None, None),
    "w2a2": (2, 2, None),
    "w2a16_head8": (2, None, 8),
}


def llama_3_8b(layers: int = 32) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        tie_word_embeddings=False,
    )


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    *,
    scaling: float,
    position: Tensor | None = None,
    **settings: Any,
) -> tuple[Tensor, None]:
    """Attention over a static cache: the flash kernel for a prompt, batched products for one token.

    Args:
        query: [batch, heads, tokens, head_dim]; key, value: [batch, key-value heads, length, head_dim].
        position: int64 [1], the place of one token, which attends to those up to it; None for a prompt, which starts
            the cache.
    Returns:
        [batch, tokens, heads, head_dim], None.
    """
    batch, heads, tokens, size = query.shape
    if position is None:
        prompt = (query, key[:, :, :tokens], value[:, :, :tokens])
        y = F.scaled_dot_product_attention(*prompt, is_causal=True, scale=scaling, enable_gqa=True)
        return y.transpose(1, 2), None
    # Heads that share keys and values are the rows of a product. Inductor computes the mask within the softmax.
    later = torch.arange(key.shape[2], device=key.device) > position
    scores = query.view(batch, key.shape[1], -1, size) @ key.transpose(-1, -2)
    scores = (scores.float() * scaling).masked_fill(later, float("-inf"))
    return (scores.softmax(-1).to(value.dtype) @ value).view(batch, 1, heads, size), None


# Of one token: two batched products and a softmax, or one kernel (decode_attention.py).
ATTENTIONS = ("products", "one_launch")
AttentionInterface.register("bbb_ao_products", attention)


def attend_in_one_launch(
    module: Any, normed: Tensor, rotary: tuple[Tensor, Tensor], cache: "LayerCache", position: Tensor
) -> Tensor:
    """What a Llama's attention module computes of one token, [batch, 1, hidden]; it changes the cache.

    Args:
        normed: [batch, 1, hidden]; rotary: cosines and sines, [1, 1, head_dim]; position: int64 [1].
    """
    shape = (*normed.shape[:2], -1, module.head_dim)
    own = (project(normed).view(shape) for project in (module.q_proj, module.k_proj, module.v_proj))
    y = decode_attention(*own, *rotary, cache.keys, cache.values, position, module.scaling)
    return module.o_proj(y.flatten(2))


def build(config: LlamaConfig, impl: str, device: str, seed: int = 0) -> Any:
    """The model with random weights of `impl`, made on the device; its projections that share an input are fused."""
    bits, act_bits, head_bits = IMPLEMENTATIONS[impl]
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    if bits is not None:
        for _, block in find_blocks(model):
            _replace_linears(block, bits, act_bits)
    if head_bits is not None:
        _replace_linears(model, head_bits, None, fixed_bits=True)
    model.to_empty(device=device)
    # Not among the parameters: computed from the configuration.
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(device)
    generator = torch.Generator(device).manual_seed(seed)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
        if parameter.dim() > 1:
            parameter.normal_(0, 0.02, generator=generator)
        else:
            parameter.fill_(1)
    for layer in packed_linears(model).values():
        randomize(layer, generator)
    if bits is not None:
        fuse_projections(model)
    return model


def _replace_linears(module: nn.Module, bits: int, act_bits: int | None, fixed_bits: bool = False) -> None:
    for name, linear in list(module.named_modules()):
        if isinstance(linear, nn.Linear):
            parent, _, child = name.rpartition(".")
            shape = (linear.in_features, linear.out_features, linear.in_features)
            packed = PackedLinear(*shape, Grid(), bits, act_bits=act_bits, fixed_bits=fixed_bits, device="meta")
            setattr(module.get_submodule(parent), child, packed)


def randomize(layer: PackedLinear, generator: torch.Generator) -> None:
    """Random codes whose weights have a standard deviation of about 0.018: scales of 3/4 to 3/2 times 2**-6."""
    for plane in (layer.plane_high, layer.plane_mid, layer.plane_low):
        if plane is not None:
            plane.random_(0, 256, generator=generator)
    layer.scale.random_(0x34, 0x3D, generator=generator)
    layer.scale_exponent.fill_(-6)
    if layer.zero_point is not None:
        # Two offsets a byte, near the middle of the grid, 8.
        low, high = (torch.empty_like(layer.zero_point).random_(6, 11, generator=generator) for _ in range(2))
        layer.zero_point.copy_(low | (high << 4))


class LayerCache:
    """Keys and values of one block, [batch, key-value heads, length, head_dim], written at `position`, int64 [tokens].

    Attention modules of transformers call `update`.
    """

    def __init__(self, keys: Tensor, values: Tensor, position: Tensor) -> None:
        self.keys, self.values, self.position = keys, values, position

    def update(self, keys: Tensor, values: Tensor, *place: Any, **settings: Any) -> tuple[Tensor, Tensor]:
        self.keys.index_copy_(2, self.position, keys)
        self.values.index_copy_(2, self.position, values)
        return self.keys, self.values


class Decoder:
    """Greedy decoding of one batch.

    Args:
        compiled: whether both are compiled, with `options` for torch.compile.
        span: blocks of a step that are compiled as one function.
        attention: of one token, one of `ATTENTIONS`.
    Raises:
        ValueError: another attention.
    Attributes:
        prompt: int64 [batch, prompt tokens]; output: int64 [batch, prompt + new tokens], of which `prefill` writes the
            first new token and each `step` the next one.
    """

    def __init__(
        self,
        model: Any,
        prompt: Tensor,
        new_tokens: int,
        compiled: bool,
        options: dict[str, Any] | None = None,
        span: int = 1,
        attention: str = "products",
    ) -> None:
        if attention not in ATTENTIONS:
            raise ValueError(f"attention: expected one of {', '.join(ATTENTIONS)}, got {attention!r}")
        self.model, self.prompt, self.span, self.attention = model, prompt, span, attention
        model.config._attn_implementation = "bbb_ao_products"
        batch, tokens = prompt.shape
        length, device = tokens + new_tokens, prompt.device
        self.output = torch.zeros(batch, length, dtype=torch.int64, device=device)
        self.output[:, :tokens] = prompt
        self.token = torch.zeros(batch, 1, dtype=torch.int64, device=device)
        self.position = torch.zeros(1, dtype=torch.int64, device=device)
        self.places = torch.arange(length, device=device)
        config, blocks = model.config, model.model.layers
        shape = (batch, config.num_key_value_heads, length, config.hidden_size // config.num_attention_heads)
        stored = [[torch.zeros(shape, dtype=model.dtype, device=device) for _ in range(2)] for _ in blocks]
        self.caches = [LayerCache(keys, values, self.position) for keys, values in stored]
        self.prompt_caches = [LayerCache(keys, values, self.places[:tokens]) for keys, values in stored]
        self.norms = [*(block.input_layernorm for block in blocks), model.model.norm]
        for block in blocks:
            # A number of their own would let every block be compiled again.
            block.self_attn.layer_idx = 0

        def compile_(function: Callable[..., Any]) -> Callable[..., Any]:
            return torch.compile(function, fullgraph=True, dynamic=False, options=options) if compiled else function

        self.start, self.blocks, self.tail = map(compile_, (start_token, run_blocks, choose_token))

    @torch.no_grad()
    def prefill(self) -> None:
        """Read the prompt and choose the first new token."""
        place = self.places[: self.prompt.shape[1]]
        state = self.start(self.model.model, self.norms[0], self.prompt, place)
        self.position.fill_(self.prompt.shape[1] - 1)
        self._finish(1, state, None, self.prompt_caches)

    @torch.no_grad()
    def step(self) -> None:
        """Read the last token and choose the next one."""
        state = self.start(self.model.model, self.norms[0], self.token, self.position)
        self._finish(self.span, state, self.position, self.caches)

    def _finish(self, span: int, state: tuple, position: Tensor | None, caches: list) -> None:
        hidden, normed, rotary = state
        parts = list(zip(self.model.model.layers, self.norms[1:], caches, strict=True))
        for first in range(0, len(parts), span):
            taken = parts[first : first + span]
            hidden, normed = self.blocks(taken, hidden, normed, rotary, position, self.attention == "one_launch")
        self.tail(self.model.lm_head, normed[:, -1:], self.token, self.output, self.position)


def start_token(
    model: Any, norm: nn.Module, ids: Tensor, position: Tensor
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """(embedded ids, the first block's norm of them, rotary cosines and sines)."""
    hidden = model.embed_tokens(ids)
    return hidden, norm(hidden), rotary_parts(model.rotary_emb, position, hidden.dtype)


def rotary_parts(embedding: Any, position: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines of a LlamaRotaryEmbedding, [1, tokens, head_dim], without its matrix product of one column.

    That product would be a launch of the library's in each step.
    """
    angles = (position.float().unsqueeze(-1) * embedding.inv_freq).repeat(1, 2).unsqueeze(0)
    cosine, sine = angles.cos() * embedding.attention_scaling, angles.sin() * embedding.attention_scaling
    return cosine.to(dtype), sine.to(dtype)


def run_blocks(
    parts: list[tuple[Any, nn.Module, LayerCache]],
    hidden: Tensor,
    normed: Tensor,
    rotary: tuple,
    position: Tensor | None,
    one_launch: bool,
) -> tuple[Tensor, Tensor]:
    """Decoder blocks, each with the norm behind it.

    Args:
        normed: the first block's own first norm of `hidden`.
        position: int64 [1], of one token; None for a prompt.
        one_launch: whether one token's attention is one kernel.
    """
    for module, norm, cache in parts:
        if one_launch and position is not None:
            attended = attend_in_one_launch(module.self_attn, normed, rotary, cache, position)
        else:
            attended, _ = module.self_attn(
                hidden_states=normed,
                position_embeddings=rotary,
                attention_mask=None,
                past_key_values=cache,
                position=position,
            )
        hidden = hidden + attended
        hidden = hidden + module.mlp(module.post_attention_layernorm(hidden))
        normed = norm(hidden)
    return hidden, normed


def choose_token(head: nn.Module, normed: Tensor, token: Tensor, output: Tensor, position: Tensor) -> None:
    """Choose the token behind `position` from the last hidden state there; advance, and write it down.

    In two steps, since Inductor searches all logits of a row in one program.
    """
    logits = head(normed)
    size = math.gcd(logits.shape[-1], 256)
    best, place = logits.unflatten(-1, (-1, size)).max(-1)
    part = best.argmax(-1, keepdim=True)
    chosen = (part * size + place.gather(-1, part)).squeeze(-1)
    position.add_(1)
    token.copy_(chosen)
    output.index_copy_(1, position, chosen)

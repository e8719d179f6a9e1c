"""Self-speculative decoding: a narrow width of a model drafts tokens, a wider width of the same tensors verifies them.

The decoding loop is transformers' assisted generation; here is the draft that shares every tensor, and the count.
Source: Leviathan et al., "Fast inference from transformers via speculative decoding" (arXiv 2211.17192), for greedy
decoding.
"""

import copy
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bbb_ao.packed_linear import packed_linears, set_bits


def at_bits(model: Any, bits: int) -> Any:
    """A second module tree over the tensors of `model`, which runs at width `bits`; copies no tensor.

    Make it after the model is on its device and in its type: moving or casting either of them later ends the sharing.

    Returns:
        a model of the same class, with configurations of its own.
    Raises:
        ValueError: see `set_bits`.
    """
    shared = [*model.parameters(), *model.buffers()]
    for layer in packed_linears(model).values():
        if layer.fused is not None:
            shared += [value for value in vars(layer.fused).values() if isinstance(value, Tensor)]
    # deepcopy takes what it finds in its memo as copied already.
    tree = copy.deepcopy(model, {id(tensor): tensor for tensor in shared})
    return set_bits(tree, bits)


@dataclass(frozen=True)
class Speculation:
    """What `speculate` generated, and how.

    Attributes:
        sequences: int64 [1, prompt + generated tokens].
        tokens: that were generated; rounds: forward passes of the verifying model.
        drafted: tokens that the draft proposed; accepted: those of them that the verifying model would have chosen.
        seconds: all told.
    """

    sequences: Tensor
    tokens: int
    rounds: int
    drafted: int
    accepted: int
    seconds: float

    def __str__(self) -> str:
        share = 100 * self.accepted / max(self.drafted, 1)
        return (
            f"{self.tokens} tokens, {self.tokens / self.seconds:.1f} tokens/s, accepted {self.accepted} of "
            f"{self.drafted} drafted tokens ({share:.0f} %), {self.rounds} verifying passes"
        )


def speculate(model: Any, draft: Any, input_ids: Tensor, draft_tokens: int = 4, **settings: Any) -> Speculation:
    """Greedy decoding of `model`, with tokens that `draft` proposes and `model` verifies, several in one pass.

    In exact arithmetic the tokens are those of `model.generate(input_ids, do_sample=False, **settings)`. In floating
    point, a pass of several tokens may round another way than passes of one, and two tokens whose logits differ by less
    than that may change places: in float32 this is rare, in bfloat16 equal largest logits are not.

    Args:
        model: verifies, at the widths that it runs at.
        draft: a model with the same tokenizer, such as `at_bits(model, 2)`; the settings of drafting in its
            `generation_config` are overwritten.
        input_ids: int64 [1, tokens].
        draft_tokens: proposed at a time, at least 1.
        settings: of `generate`, such as max_new_tokens and streamer; not do_sample, and no static cache.
    Raises:
        ValueError: draft_tokens, or several sequences.
    """
    if isinstance(draft_tokens, bool) or not isinstance(draft_tokens, int) or draft_tokens < 1:
        raise ValueError(f"draft_tokens: expected a number of at least 1, got {draft_tokens!r}")
    if input_ids.dim() != 2 or input_ids.shape[0] != 1:
        raise ValueError(f"input_ids: expected one sequence, [1, tokens], got {list(input_ids.shape)}")
    draft.generation_config.update(
        num_assistant_tokens=draft_tokens, num_assistant_tokens_schedule="constant", assistant_confidence_threshold=0.0
    )
    passes = {model: 0, draft: 0}

    def count(module: nn.Module, args: Any) -> None:
        passes[module] += 1

    hooks = [module.register_forward_pre_hook(count) for module in passes]
    start = time.perf_counter()
    try:
        with torch.no_grad():
            sequences = model.generate(input_ids, assistant_model=draft, do_sample=False, **settings)
    finally:
        for hook in hooks:
            hook.remove()
    tokens = sequences.shape[1] - input_ids.shape[1]
    # A pass of the draft is one token; a pass of the model gives its own next token behind those that it accepts.
    accepted = tokens - passes[model]
    return Speculation(sequences, tokens, passes[model], passes[draft], accepted, time.perf_counter() - start)

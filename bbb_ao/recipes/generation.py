"""Text that a language model writes itself: free training data, from the distribution that a student is to learn."""

import torch
from torch import Tensor, nn

from bbb_ao.errors import NumericsError
from bbb_ao.recipes.optimization import autocast

# Tokens of calibration text that each sequence starts with, so that the sequences differ in subject.
PROMPT = 4
GENERATED_AT_ONCE = 64


@torch.no_grad()
def generate_sequences(
    model: nn.Module,
    sequences: Tensor,
    count: int,
    seed: int,
    device: torch.device,
    batch_size: int = GENERATED_AT_ONCE,
    temperature: float = 1.0,
    prompt: int = PROMPT,
) -> Tensor:
    """Sample sequences from a model, each token from its whole distribution softmax(z / temperature).

    Sequence i starts with the first `prompt` tokens of calibration sequence i modulo their number. An end-of-sequence
    token does not end a sequence: what follows it is the next document, as in packed calibration text.

    Args:
        model: in evaluation mode; it is on its own device again afterwards.
        sequences: calibration ids, int64 [sequences, tokens]; the result has as many tokens in a row.
        count: sequences to write; seed: of the samples.
        device: where the model runs.
    Returns:
        int64 [count, tokens], on the CPU. One seed gives the same ids on the same machine.
    Raises:
        NumericsError: the model's probabilities are NaN.
    """
    generator = torch.Generator(device).manual_seed(seed)
    home = next(model.parameters()).device
    prompts = sequences[torch.arange(count) % len(sequences), :prompt]
    model.to(device)
    try:
        written = [
            _continue(model, rows.to(device), sequences.shape[1], generator, temperature).cpu()
            for rows in prompts.split(batch_size)
        ]
    finally:
        model.to(home)
    return torch.cat(written)


def _continue(model: nn.Module, ids: Tensor, length: int, generator: torch.Generator, temperature: float) -> Tensor:
    """[batch, prompt] -> [batch, length], one token at a time, with the model's cache where it has one."""
    cache, fresh = None, ids
    while ids.shape[1] < length:
        with autocast(ids.device):
            output = model(fresh, past_key_values=cache, use_cache=True)
        cache = output.get("past_key_values")
        probabilities = (output.logits[:, -1].float() / temperature).softmax(-1)
        if not bool(torch.isfinite(probabilities).all()):
            raise NumericsError("generation: NaN or infinity in the model's logits; fix: check the model's weights")
        ids = torch.cat([ids, torch.multinomial(probabilities, 1, generator=generator)], 1)
        # A model that hands no such cache over (Mamba) reads all of it again.
        fresh = ids if cache is None else ids[:, -1:]
    return ids[:, :length]

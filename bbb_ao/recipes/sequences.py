"""Calibration ids: read from text by a recipe, and checked against the model that is to see them."""

from typing import Any

import torch
from torch import Tensor, nn

from bbb_ao.errors import DataError, RecipeError
from bbb_ao.recipes.stages import Recipe


def read_sequences(data: Any, tokenizer: Any, recipe: Recipe, model: nn.Module) -> Tensor:
    """Calibration ids of a recipe's size, int64 [sequences, tokens], from text; ids are returned as they are.

    Raises:
        DataError: text without a tokenizer, or too little of it. RecipeError: more tokens than the model has positions.
    """
    if isinstance(data, Tensor):
        return data
    if tokenizer is None:
        raise DataError("tokenizer: expected one for data that is text, got None; fix: pass tokenizer=")
    check_length(recipe, model)
    from bbb_ao.recipes.data import calibration_sequences

    count, length = recipe.sequences, recipe.sequence_length
    return calibration_sequences(tokenizer, data, count, length, recipe.seed, _vocabulary(model))


def check_length(recipe: Recipe, model: nn.Module) -> None:
    """Refuse sequences of more tokens than the model has positions.

    Raises:
        RecipeError: as above.
    """
    longest = _longest(model)
    if longest is not None and recipe.sequence_length > longest:
        raise RecipeError(
            f"sequence_length: expected at most the model's {longest} positions, got {recipe.sequence_length}; "
            "fix: lower it"
        )


def check_sequences(sequences: Tensor, model: nn.Module) -> None:
    """Refuse what is no matrix of ids of the model's vocabulary, or has more tokens in a row than it has positions.

    Raises:
        DataError: as above.
    """
    shape, vocabulary, longest = tuple(sequences.shape), _vocabulary(model), _longest(model)
    if sequences.dtype != torch.int64 or len(shape) != 2 or 0 in shape:
        raise DataError(
            f"sequences: expected int64 [sequences, tokens], got {sequences.dtype} {shape}; fix: stack token ids"
        )
    low, high = int(sequences.min()), int(sequences.max())
    if low < 0 or high >= vocabulary:
        raise DataError(
            f"sequences: expected ids from 0 to {vocabulary - 1}, the model's vocabulary, got {low} to {high}; "
            "fix: use the model's own tokenizer"
        )
    if longest is not None and shape[1] > longest:
        raise DataError(
            f"sequences: expected at most the model's {longest} positions, got {shape[1]} tokens; fix: cut them shorter"
        )


def _vocabulary(model: Any) -> int:
    return model.get_input_embeddings().num_embeddings


def _longest(model: Any) -> int | None:
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)

"""Perplexity against a float64 loop, and what it refuses."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from bbb_ao.errors import DataError, NumericsError
from bbb_ao.recipes.evaluate import perplexity


class Bigram(nn.Module):
    """Logits of the next token from the current one alone."""

    def __init__(self, vocabulary: int = 11) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Parameter(torch.randn(vocabulary, vocabulary))

    def forward(self, ids: Tensor, **_: object) -> SimpleNamespace:
        return SimpleNamespace(logits=self.table[ids])


@pytest.mark.parametrize("batch_size", [1, 2, 3, 7])
def test_perplexity_is_exp_of_the_mean_loss(batch_size: int) -> None:
    model, windows = Bigram(), torch.randint(0, 11, (5, 9))
    logs = model.table.detach().double().log_softmax(-1)
    expected = (-logs[windows[:, :-1], windows[:, 1:]]).mean().exp().item()
    seen: list[int] = []
    # float32 sums of 40 terms of about 3: far below 1e-5 relative.
    assert perplexity(model.train(), windows, batch_size, on_batch=seen.append) == pytest.approx(expected, rel=1e-5)
    assert sum(seen) == 5
    assert model.training


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_loss_that_is_not_finite_is_an_error(value: float) -> None:
    model = Bigram()
    with torch.no_grad():
        model.table[3, :] = value
    windows = torch.zeros(4, 6, dtype=torch.int64)
    windows[2, 1] = 3
    with pytest.raises(NumericsError, match="windows 2 to 3"):
        perplexity(model, windows, 2)


def test_perplexity_beyond_float64_is_an_error() -> None:
    model = Bigram()
    with torch.no_grad():
        model.table.zero_()[:, 0] = -1e4
    with pytest.raises(NumericsError, match="below 709"):
        perplexity(model, torch.zeros(1, 4, dtype=torch.int64))


@pytest.mark.parametrize("shape", [(0, 8), (4, 1), (8,)])
def test_no_window_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(DataError, match="windows"):
        perplexity(Bigram(), torch.zeros(shape, dtype=torch.int64))

"""When kernels are launched to start early, and when what they read first may have been written just before."""

import pytest
import torch

pytest.importorskip("triton", reason="the kernels need Triton")
from triton import knobs

from bbb_ao.kernels.dependent_launch import dependent_launch

GPU = torch.device("cuda", 0)
OFF = {"PDL": False, "fresh": 0}


@pytest.fixture(autouse=True)
def _hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(knobs.runtime, "interpret", False)
    monkeypatch.delenv("BBB_AO_PDL", raising=False)


@pytest.mark.parametrize("captured", [False, True])
def test_a_weight_is_a_constant_in_a_captured_graph_alone(monkeypatch: pytest.MonkeyPatch, captured: bool) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: captured)
    assert dependent_launch(GPU) == {"PDL": True, "fresh": int(not captured), "launch_pdl": True}


def test_it_can_be_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BBB_AO_PDL", "off")
    assert dependent_launch(GPU) == OFF


def test_what_has_no_such_launches_gets_none(monkeypatch: pytest.MonkeyPatch) -> None:
    assert dependent_launch(torch.device("cpu")) == OFF
    monkeypatch.setattr(knobs.runtime, "interpret", True)
    assert dependent_launch(GPU) == OFF
    monkeypatch.setattr(knobs.runtime, "interpret", False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    assert dependent_launch(GPU) == OFF

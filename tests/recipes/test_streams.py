"""What enters the blocks, and that a block run by itself does what it does inside the model."""

import os
import tempfile
from pathlib import Path

import pytest
import torch

from bbb_ao.errors import ModelError, NumericsError, ResourceError
from bbb_ao.passes import find_blocks
from bbb_ao.recipes import streams
from bbb_ao.recipes.streams import Stream, advance, embed, record_calls, working_copy

CPU = torch.device("cpu")
ARCHITECTURES = ["llama", "gemma2", "gemma3_text", "gpt_neox", "opt", "phi", "bloom", "xglm"]


def block_values(model, blocks, ids):
    """(inputs, outputs) of every block in one forward pass of the whole model."""
    inputs, outputs = {}, {}

    def keep(block, args, kwargs, output):
        inputs[block] = kwargs.get("hidden_states", args[0] if args else None).clone()
        outputs[block] = (output[0] if isinstance(output, tuple) else output).clone()

    handles = [block.register_forward_hook(keep, with_kwargs=True) for block in blocks]
    with torch.no_grad():
        model(ids, use_cache=False)
    for handle in handles:
        handle.remove()
    return [inputs[block] for block in blocks], [outputs[block] for block in blocks]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_disk_and_memory_give_the_same(dtype):
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(5, 7, 3, generator=generator)
    memory, disk = (Stream(5, 7, 3, dtype, cache) for cache in ("memory", "disk"))
    for stream in (memory, disk):
        for rows in stream.chunks(2):
            stream.write(rows, values[rows])
    for rows in (slice(1, 4), torch.tensor([4, 0, 0])):
        read = disk.read(rows, CPU)
        assert read.dtype == torch.float32
        assert torch.equal(read, values[rows].to(dtype).float())
        assert torch.equal(read, memory.read(rows, CPU))
    other = disk.like()
    assert (other.cache, other.states.shape, other.states.dtype) == ("disk", (5, 7, 3), dtype)
    other.write(slice(0, 5), -values)
    assert torch.equal(disk.states, memory.states), "a stream of its own"


def test_a_stream_on_disk_never_has_a_name_that_a_kill_could_leave(tmp_path, monkeypatch):
    allocate = os.posix_fallocate

    def unnamed(descriptor: int, start: int, size: int) -> None:
        assert list(tmp_path.iterdir()) == [], "not even while it is filled, which takes seconds"
        allocate(descriptor, start, size)

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(os, "posix_fallocate", unnamed)
    stream = Stream(2, 3, 4, torch.float32, "disk")
    assert list(tmp_path.iterdir()) == []
    stream.write(slice(0, 2), torch.ones(2, 3, 4))
    assert stream.read(slice(0, 2), CPU).sum() == 24


def test_a_full_disk_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    with pytest.raises(ResourceError, match=r"stream: expected 96 bytes, got: .*No space.*; fix: "):
        Stream(2, 3, 4, torch.float32, "disk")
    assert list(Path(tmp_path).iterdir()) == []


def test_chunks_cover_all_sequences_once():
    stream = Stream(7, 1, 1, torch.float32)
    assert [(s.start, s.stop) for s in stream.chunks(3)] == [(0, 3), (3, 6), (6, 7)]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_recorded_call_reproduces_every_block_on_a_batch(name, make_model, ids):
    model = make_model(name)
    blocks = [block for _, block in find_blocks(model)]
    # Recorded from one sequence, replayed on other ones: nothing of the recording may be particular to it.
    calls = record_calls(model, blocks, ids[:1])
    inputs, outputs = block_values(model, blocks, ids[2:5])
    for block, call, hidden, expected in zip(blocks, calls, inputs, outputs, strict=True):
        with torch.no_grad():
            output = call.to(CPU)(working_copy(block, CPU), hidden)
        # Masks may choose another attention kernel, so rounding only: 16 eps of the largest value.
        torch.testing.assert_close(output, expected, rtol=0, atol=16 * 2**-23 * float(expected.abs().max()))


def test_an_argument_that_counts_sequences_in_another_order_is_refused(make_model, ids):
    model = make_model("bloom")
    blocks = [block for _, block in find_blocks(model)]

    def heads_first(block, args, kwargs):
        return args, kwargs | {"alibi": kwargs["alibi"].unflatten(0, (-1, 4)).transpose(0, 1).flatten(0, 1)}

    for block in blocks:
        block.register_forward_pre_hook(heads_first, with_kwargs=True)
    with pytest.raises(ModelError, match=r"alibi: expected the same for each sequence of a batch.*; fix: "):
        record_calls(model, blocks, ids[:1])


@pytest.mark.parametrize("name", ["gemma2", "gemma3_text"])
def test_layers_of_different_types_are_called_differently(name, make_model, ids):
    model = make_model(name)
    blocks = [block for _, block in find_blocks(model)]
    first, second = record_calls(model, blocks, ids[:1])
    hidden = torch.randn(1, 32, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert not torch.equal(first(blocks[0], hidden), second(blocks[0], hidden)), "the window of 8 tokens must show"


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("cache", ["memory", "disk"])
def test_embed_is_the_first_blocks_input(name, cache, make_model, ids):
    model = make_model(name)
    blocks = [block for _, block in find_blocks(model)]
    stream = embed(model, blocks[0], ids[:3], torch.float32, cache)
    inputs, _ = block_values(model, blocks, ids[:3])
    assert torch.equal(stream.states, inputs[0])
    assert not blocks[0]._forward_pre_hooks, "the hook is gone"


def test_recording_leaves_no_hooks_and_names_a_block_that_is_not_reached(make_model, ids):
    model = make_model("llama")
    blocks = [block for _, block in find_blocks(model)]
    with pytest.raises(ModelError, match="decoder block 2 is not reached"):
        record_calls(model, [*blocks, torch.nn.Linear(2, 2)], ids[:1])
    assert not any(block._forward_pre_hooks for block in blocks)


def test_a_bfloat16_model_is_recorded_in_float32(make_model, ids):
    model = make_model("llama").to(torch.bfloat16)
    blocks = [block for _, block in find_blocks(model)]
    call = record_calls(model, blocks, ids[:1])[0]
    hidden = embed(model, blocks[0], ids[:2], torch.float32, "memory").read(slice(0, 2), CPU)
    working = working_copy(blocks[0], CPU)
    assert {p.dtype for p in working.parameters()} == {torch.float32}
    assert {p.dtype for p in blocks[0].parameters()} == {torch.bfloat16}, "the model itself stays"
    with torch.no_grad():
        output = call(working, hidden)
    assert output.dtype == torch.float32
    _, expected = block_values(model, blocks, ids[:2])
    # bfloat16 keeps 8 bits: about 10 roundings of relative size 2**-9 lie between the two.
    assert (output - expected[0].float()).norm() <= 10 * 2**-9 * expected[0].float().norm()


def test_advance_runs_all_sequences_and_names_the_block_that_overflows(make_model, ids):
    model = make_model("llama")
    blocks = [block for _, block in find_blocks(model)]
    call = record_calls(model, blocks, ids[:1])[0]
    stream = embed(model, blocks[0], ids[:5], torch.float32, "memory")
    before = stream.states.clone()
    following = advance(stream, lambda hidden: call(blocks[0], hidden), CPU, 2, "layers.0")
    inputs, _ = block_values(model, blocks, ids[:5])
    torch.testing.assert_close(following.states, inputs[1], rtol=1e-5, atol=1e-5)
    assert torch.equal(stream.states, before)
    with pytest.raises(NumericsError, match=r"^layers\.0: NaN or infinity in the block's output"):
        advance(stream, lambda hidden: hidden / 0, CPU, 2, "layers.0")


def test_a_call_moves_its_tensors(make_model, ids):
    model = make_model("llama")
    blocks = [block for _, block in find_blocks(model)]
    call = record_calls(model, blocks, ids[:1])[0].to(torch.device("meta"))
    cos, sin = call.kwargs["position_embeddings"]
    assert cos.is_meta
    assert sin.is_meta
    assert streams.BlockCall((), {}).to(CPU).args == ()

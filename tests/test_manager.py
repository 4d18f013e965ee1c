"""PagedAttentionManager: its tensors, and decoding over the cache it owns."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from conftest import assert_accurate
from torch._dynamo.utils import counters
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode

from paged_ops import Batch, OutOfBlocks, PagedAttentionManager, ops, swap


def make_manager(device="cpu", **changes) -> PagedAttentionManager:
    arguments = {
        "num_sequences": 4,
        "num_heads": 2,
        "head_size": 8,
        "block_size": 4,
        "num_blocks": 10,
        "device": device,
        "dtype": torch.float32,
        "num_layers": 2,
    }
    return PagedAttentionManager(**{**arguments, **changes})


def state(manager: PagedAttentionManager) -> tuple:
    tensors = (manager.block_table, manager.seq_lens, *manager.caches)
    return manager.seq_block_mapping, manager.rows, [tensor.tolist() for tensor in tensors]


class Copies(TorchDispatchMode):
    """Sees how many elements are copied into tensors, and whether the host waits for it."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []
        self.blocking: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is torch.ops.aten.copy_.default:
            self.note(function, args[1], args[0].device, args[2:] == (True,))
        elif function is torch.ops.aten._to_copy.default:
            self.note(function, args[0], kwargs["device"], kwargs.get("non_blocking", False))
        return function(*args, **kwargs)

    def note(self, function, source, device, non_blocking) -> None:
        self.sizes.append(source.numel())
        if source.device != device and not non_blocking:
            self.blocking.append(str(function))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_end_to_end(dtype, device):
    """K and V copied block by block into the cache, the operator, and dense attention."""
    seq_lens, num_heads, head_size, block_size = [37, 1, 16, 64], 4, 64, 16
    manager = PagedAttentionManager(
        len(seq_lens), num_heads, head_size, block_size, 32, device, dtype
    )
    torch.manual_seed(0)
    query = torch.randn(len(seq_lens), num_heads, head_size, device=device).to(dtype)
    out = torch.empty(query.shape, dtype=torch.float32, device=device)
    dense = []
    for seq_id, seq_len in enumerate(seq_lens):
        manager.add_sequence(seq_id, seq_len)
        key, value = torch.randn(2, seq_len, num_heads, head_size, device=device).to(dtype).unbind()
        for i, block in enumerate(manager.seq_block_mapping[seq_id]):
            tokens = slice(i * block_size, min((i + 1) * block_size, seq_len))
            n = tokens.stop - tokens.start
            manager.kv_cache[block, :n, 0] = key[tokens]
            manager.kv_cache[block, :n, 1] = value[tokens]
        q, k, v = (
            each.transpose(0, 1).float() for each in (query[seq_id : seq_id + 1], key, value)
        )
        dense.append(scaled_dot_product_attention(q, k, v).transpose(0, 1))
    key_cache, value_cache = manager.kv_cache.unbind(2)
    ops.paged_attention_v1(
        out, query, key_cache, value_cache, manager.block_table, manager.seq_lens
    )
    assert_accurate(out, torch.cat(dense).cpu().double(), dtype)


def test_kv_cache_is_a_view_of_what_the_operators_read(device):
    manager = make_manager(device)
    assert manager.kv_cache.shape == (10, 4, 2, 2, 8)
    manager.kv_cache[3, :2, 1] = 5.0
    assert (manager.caches[0][3, 1, :2] == 5.0).all()
    assert manager.caches[0].sum() == 5.0 * 2 * 2 * 8
    assert not manager.caches[1].any()


def test_tensors_follow_the_sequences(device):
    manager = make_manager(device)
    table, lens = manager.block_table, manager.seq_lens
    manager.add_sequence(2, 5)
    manager.add_sequence(100, 4)
    assert manager.rows == {2: 2, 100: 0}
    manager.append(100)
    assert manager.seq_lens.tolist() == [5, 0, 5, 0]
    for seq_id, row in manager.rows.items():
        blocks = manager.seq_block_mapping[seq_id]
        assert manager.block_table[row, : len(blocks)].tolist() == blocks
    manager.free_sequence(2)
    assert manager.seq_lens.tolist() == [5, 0, 0, 0]
    assert manager.block_table.data_ptr() == table.data_ptr()
    assert manager.seq_lens.data_ptr() == lens.data_ptr()


def test_batch(device):
    manager = make_manager(device)
    manager.add_sequence(0, 6)
    manager.add_sequence(1, 0)
    manager.add_sequence(2, 9)
    batch = manager.batch([2, 1, 0], [3, 0, 6])
    blocks = manager.seq_block_mapping
    assert batch.seq_lens.tolist() == [9, 0, 6]
    assert batch.query_start_loc.tolist() == [0, 3, 3, 9]
    assert batch.positions.tolist() == [6, 7, 8, 0, 1, 2, 3, 4, 5]
    slots = [blocks[s][p // 4] * 4 + p % 4 for s, p in [(2, 6), (2, 7), (2, 8)]]
    assert batch.slot_mapping[:3].tolist() == slots
    assert batch.block_table[0, :3].tolist() == blocks[2]
    assert batch.block_table[2, :2].tolist() == blocks[0]
    assert all(each.device.type == device.type for each in vars(batch).values())
    for tensor in vars(batch).values():
        assert tensor._base is None, "compiled steps would guard on the base"


def test_decode_batch_needs_no_query_start_loc():
    manager = make_manager()
    manager.add_sequence(0, 3)
    assert manager.batch([0]).query_start_loc is None
    assert manager.batch([0], [1]).query_start_loc.tolist() == [0, 1]
    assert manager.slot_mapping(0).tolist() == [2]
    assert manager.slot_mapping([0], 3).tolist() == [0, 1, 2]


def test_ids_and_numbers_of_any_kind():
    manager = make_manager()
    for seq_id in np.arange(3):
        manager.add_sequence(seq_id, np.int32(2))
    assert all(type(seq_id) is int for seq_id in manager.rows)
    manager.append(np.int64(1))
    manager.append((seq_id for seq_id in range(3)), np.array([1, 2, 3]))
    manager.append({0: "a", 2: "b"}, torch.tensor([1, 1]))
    assert manager.seq_lens.tolist() == [4, 5, 6, 0]
    manager.reserve(torch.tensor([0, 1]), np.int64(2))
    assert manager.step(iter([2, 0])).seq_lens.tolist() == [7, 5]
    assert manager.step(1).seq_lens.tolist() == [6]
    assert manager.batch(np.array([0]), np.int64(1)).query_start_loc is None
    assert manager.batch(0, (2,)).query_start_loc.tolist() == [0, 2]
    assert manager.slot_mapping(torch.tensor(1), torch.tensor(3)).shape == (3,)
    manager.truncate(np.int64(2), torch.tensor(0))
    assert manager.share(torch.tensor(2), torch.arange(4)) == 0
    manager.fork(np.int64(0), np.int64(7))
    manager.free_sequence(seq_id for seq_id in (0, 7))
    manager.free_sequence(np.int64(1))
    assert manager.rows == {2: 2}


def test_padded_batch():
    manager = make_manager()
    manager.add_sequence(0, 6)
    batch = manager.batch([0], pad_to=3)
    assert batch.seq_lens.tolist() == [6, 0, 0]
    assert batch.slot_mapping.tolist()[1:] == [-1, -1]
    assert batch.positions.tolist() == [5, 0, 0]
    assert batch.block_table.shape == (3, 10)
    assert manager.batch([0], [2], pad_to=2).query_start_loc.tolist() == [0, 2, 3]
    assert manager.batch([0], pad_to=1).seq_lens.tolist() == [6]


def test_batch_sends_what_its_sequences_have_and_is_as_wide_as_the_table():
    manager = make_manager()
    manager.add_sequence(0, 6)
    manager.reserve(0, 5)
    blocks = manager.seq_block_mapping[0]
    assert len(blocks) == 3
    with Copies() as copies:
        table = manager.batch([0], pad_to=2).block_table
    assert table.shape == (2, 10)
    assert table[0, :3].tolist() == blocks
    assert max(copies.sizes) == len(blocks)


def test_empty_batch():
    batch = make_manager().batch([], [])
    assert batch.block_table.shape == (0, 10)
    assert batch.query_start_loc.tolist() == [0]
    assert batch.slot_mapping.shape == (0,)


def exercise_copies(manager: PagedAttentionManager) -> None:
    """Every way of sending something to the device, or of fetching it."""
    manager.add_sequence(0, 6)
    manager.fork(0, 1)
    manager.append([0, 1])
    manager.fork(0, 2)
    manager.step([2])
    manager.batch([0, 1], [2, 3])
    assert manager.seq_lens.shape == (4,)
    manager.swap_out(1)
    assert manager.block_table.shape == (4, 10)
    manager.swap_in(1)


def test_no_copy_is_waited_for():
    """The meta device takes copies as a GPU does: from other memory."""
    manager = make_manager("meta")
    with Copies() as copies:
        exercise_copies(manager)
    assert len(copies.sizes) > 10
    assert copies.blocking == []


@pytest.mark.gpu
def test_nothing_waits_for_the_gpu():
    manager = make_manager("cuda")
    exercise_copies(manager)
    for seq_id in range(3):
        manager.free_sequence(seq_id)
    torch.cuda.set_sync_debug_mode("error")
    try:
        exercise_copies(manager)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_swapping_takes_the_memory_of_one_layer():
    manager = make_manager("cuda", num_blocks=4096, num_layers=8, head_size=64)
    manager.add_sequence(0, 4096 * 4)
    one = manager.caches[0].nbytes
    for call in (manager.swap_out, manager.swap_in):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call(0)
        assert one <= torch.cuda.max_memory_allocated() - before < 2 * one


def test_fork_copies_on_write_in_every_layer(device):
    manager = make_manager(device)
    manager.add_sequence(0, 6)
    for layer, cache in enumerate(manager.caches):
        cache.copy_(torch.randn(cache.shape) + layer)
    manager.fork(0, 1)
    assert manager.seq_block_mapping[0] == manager.seq_block_mapping[1]
    manager.append([0, 1])
    parent, child = manager.seq_block_mapping[0], manager.seq_block_mapping[1]
    assert parent[0] == child[0]
    assert parent[1] != child[1]
    for cache in manager.caches:
        assert torch.equal(cache[parent[1]], cache[child[1]])


def test_decoding_a_fork_leaves_its_parent_alone(device):
    """Parent and child write different tokens; each attends to its own."""
    manager = make_manager(device, num_layers=1)
    manager.add_sequence(0, 6)
    key, value = torch.randn(2, 6, 2, 8, device=device).unbind()
    ops.write_kv(key, value, manager.caches[0], manager.slot_mapping(0, 6))
    manager.fork(0, 1)
    manager.append([0, 1])
    new_key, new_value = torch.randn(2, 2, 2, 8, device=device).unbind()
    batch = manager.batch([0, 1])
    ops.write_kv(new_key, new_value, manager.caches[0], batch.slot_mapping)
    query = torch.randn(2, 2, 8, device=device)
    out = ops.attention(query, manager.caches[0], batch.block_table, batch.seq_lens)
    for i in range(2):
        k, v = torch.cat((key, new_key[i : i + 1])), torch.cat((value, new_value[i : i + 1]))
        q, k, v = (each.transpose(0, 1) for each in (query[i : i + 1], k, v))
        wanted = scaled_dot_product_attention(q, k, v)[:, 0]
        torch.testing.assert_close(out[i], wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m: m.add_sequence(9, 100), OutOfBlocks, "25 needed, 8 free"),
        (lambda m: m.append(0, 40), OutOfBlocks, "10 needed, 8 free"),
        (lambda m: m.add_sequence(0, 3), ValueError, "seq_id must be new, got 0"),
        (lambda m: m.add_sequence(9, -1), ValueError, "num_tokens must be at least 0, got -1"),
        (
            lambda m: m.add_sequence(9, 121),
            ValueError,
            "at most max_seq_len=120 tokens, got 121",
        ),
        (
            lambda m: m.append(0, 119),
            ValueError,
            "at most max_seq_len=120 tokens, got 124",
        ),
        (lambda m: m.append(5), ValueError, "seq_id must be of a sequence that was added, got 5"),
        (lambda m: m.append([0, 0]), ValueError, "name each sequence once"),
        (lambda m: m.append(0, 0), ValueError, "num_tokens must be at least 1, got 0"),
        (lambda m: m.free_sequence(5), ValueError, r"got \[5\]"),
        (lambda m: m.fork(5, 6), ValueError, "got 5"),
        (lambda m: m.fork(0, 0), ValueError, "seq_id must be new"),
        (lambda m: m.batch([5]), ValueError, "got 5"),
        (lambda m: m.batch([0], 6), ValueError, "from 0 to the length 5"),
        (lambda m: m.batch([0], [1, 1]), ValueError, "one entry for each of the 1 sequences"),
        (
            lambda m: m.free_sequence([0, 5]),
            ValueError,
            r"that were added, each once, got \[0, 5\]",
        ),
        (
            lambda m: m.free_sequence([0, 0]),
            ValueError,
            r"that were added, each once, got \[0, 0\]",
        ),
        (lambda m: m.append("0"), TypeError, "seq_ids must be int, got '0'"),
        (lambda m: m.append(None), TypeError, "seq_ids must be int, got None"),
        (lambda m: m.append([0, 1.5]), TypeError, r"seq_ids must be int, got 1\.5"),
        (lambda m: m.append(0, 1.5), TypeError, r"num_tokens must be int, got 1\.5"),
        (lambda m: m.append(0, [[1]]), TypeError, r"num_tokens must be int, got \[1\]"),
        (lambda m: m.append(2**63), ValueError, f"seq_ids must have at most 63 bits, got {2**63}"),
        (
            lambda m: m.append([2**63]),
            ValueError,
            f"seq_ids must have at most 63 bits, got {2**63}",
        ),
        (lambda m: m.reserve(0, [1]), TypeError, r"num_tokens must be int, got \[1\]"),
        (lambda m: m.truncate([0], 1), TypeError, r"seq_id must be int, got \[0\]"),
        (lambda m: m.preempt(None), TypeError, "seq_id must be int, got None"),
        (lambda m: m.swap_out("a"), TypeError, "seq_id must be int, got 'a'"),
        (lambda m: m.swap_in("a"), TypeError, "seq_id must be int, got 'a'"),
        (lambda m: m.fork(0, 1.0), TypeError, r"child_id must be int, got 1\.0"),
        (lambda m: m.add_sequence(1, "a"), TypeError, "seq_len must be int, got 'a'"),
        (lambda m: m.share(0, [1], salt="a"), TypeError, "salt must be int, got 'a'"),
        (lambda m: m.share(0, 7), TypeError, "tokens must be a sequence of int .* got 7"),
        (lambda m: m.step([0], pad_to="a"), TypeError, "pad_to must be int, got 'a'"),
        (lambda m: m.batch(torch.tensor([0.0])), TypeError, r"seq_ids must be int, got 0\.0"),
        (lambda m: m.batch([0], "1"), TypeError, "num_new_tokens must be int, got '1'"),
        (lambda m: m.can_allocate(1.5), TypeError, r"num_tokens must be int, got 1\.5"),
    ],
)
def test_an_error_changes_nothing(call, error, message, device):
    manager = make_manager(device, max_seq_len=120)
    manager.add_sequence(0, 5)
    before = state(manager)
    with pytest.raises(error, match=message):
        call(manager)
    assert state(manager) == before
    manager.blocks.check()


def test_a_sequence_of_blocks_alone_is_not_freed_here():
    manager = make_manager()
    manager.blocks.allocate(3, 5)
    with pytest.raises(ValueError, match=r"that were added, each once, got \[3\]"):
        manager.free_sequence(3)
    assert 3 in manager.blocks


def test_no_row_is_left():
    manager = make_manager(num_sequences=1)
    manager.add_sequence(0, 1)
    for call in (lambda: manager.add_sequence(1, 1), lambda: manager.fork(0, 1)):
        with pytest.raises(ValueError, match="all num_sequences=1 sequences are in use"):
            call()
    manager.free_sequence(0)
    manager.add_sequence(1, 1)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_sequences", 0),
        ("num_heads", 0),
        ("head_size", 0),
        ("head_size", 257),
        ("block_size", 0),
        ("num_blocks", 0),
        ("num_layers", 0),
        ("max_seq_len", 0),
        ("dtype", torch.float64),
        ("block_size", 4.0),
        ("num_blocks", "10"),
        ("max_seq_len", 1e3),
        ("watermark", 0.5),
    ],
)
def test_constructor_refuses(name, value):
    error = ValueError if isinstance(value, int | torch.dtype) else TypeError
    with pytest.raises(error, match=f"{name} must be .*, got {re.escape(repr(value))}"):
        make_manager(**{name: value})


def test_the_default_length_is_what_a_tensor_of_lengths_can_hold():
    manager = make_manager("meta", num_blocks=4096, block_size=2**20, num_layers=1)
    assert manager.max_seq_len == 2**31 - 1


def test_can_allocate():
    manager = make_manager()
    assert manager.can_allocate(40)
    assert not manager.can_allocate(41)
    manager.add_sequence(0, 1)
    assert not manager.can_allocate(40)
    assert manager.num_free_blocks == 9


def test_step_past_the_longest_sequence_says_so():
    manager = make_manager(max_seq_len=8)
    manager.add_sequence(0, 8)
    with pytest.raises(ValueError, match="at most max_seq_len=8 tokens, got 9"):
        manager.step([0])


def test_step_is_append_and_batch(device):
    manager, other = make_manager(device), make_manager(device)
    for seq_id, length in ((3, 5), (1, 4), (0, 0)):
        manager.add_sequence(seq_id, length)
        other.add_sequence(seq_id, length)
    for ids in ([3, 1], [1, 3, 0], [1], [0, 3], [3]):
        stepped = manager.step(ids)
        other.append(ids)
        wanted = other.batch(ids)
        assert stepped.query_start_loc is None
        for name in ("seq_lens", "slot_mapping", "positions"):
            assert torch.equal(getattr(stepped, name), getattr(wanted, name)), name
        for row, seq_id in enumerate(ids):
            blocks = other.seq_block_mapping[seq_id]
            assert stepped.block_table[row, : len(blocks)].tolist() == blocks


def test_step_is_padded_and_stays_in_place(device):
    manager = make_manager(device)
    manager.add_sequence(0, 5)
    manager.add_sequence(1, 5)
    first = manager.step([0, 1])
    padded = manager.step([0], pad_to=3)
    assert padded.seq_lens.tolist() == [7, 0, 0]
    assert padded.slot_mapping.tolist()[1:] == [-1, -1]
    assert padded.positions.tolist() == [6, 0, 0]
    assert padded.block_table.data_ptr() == first.block_table.data_ptr()
    assert manager.seq_lens.tolist() == [7, 6, 0, 0]
    with pytest.raises(ValueError, match="pad_to must be at most num_sequences=4, got 5"):
        manager.step([0], pad_to=5)
    with pytest.raises(ValueError, match="that was added, got 9"):
        manager.step([0, 9])
    assert manager.blocks.length(0) == 7


def test_step_copies_what_a_fork_shares(device):
    manager = make_manager(device)
    manager.add_sequence(0, 6)
    for cache in manager.caches:
        cache.copy_(torch.randn(cache.shape))
    manager.fork(0, 1)
    manager.step([0, 1])
    parent, child = manager.seq_block_mapping[0], manager.seq_block_mapping[1]
    assert parent[1] != child[1]
    for cache in manager.caches:
        assert torch.equal(cache[parent[1]], cache[child[1]])


def test_reserved_blocks_are_listed(device):
    manager = make_manager(device)
    manager.add_sequence(0, 3)
    manager.reserve(0, 6)
    blocks = manager.seq_block_mapping[0]
    assert len(blocks) == 3
    assert manager.batch([0]).block_table[0, :3].tolist() == blocks
    assert manager.block_table[0, :3].tolist() == blocks
    assert manager.seq_lens.tolist()[0] == 3
    manager.append(0, 6)
    assert manager.seq_block_mapping[0] == blocks
    manager.truncate(0, 2)
    assert manager.seq_lens.tolist()[0] == 2
    assert manager.num_free_blocks == 9


def test_shared_prefix_comes_with_its_keys_and_values(device):
    manager = make_manager(device)
    tokens = list(range(9))
    manager.add_sequence(0, 9)
    manager.blocks.publish(0, tokens)
    manager.add_sequence(1, 0)
    assert manager.share(1, tokens) == 8
    assert manager.seq_block_mapping[1] == manager.seq_block_mapping[0][:2]
    assert manager.seq_lens.tolist() == [9, 8, 0, 0]
    assert manager.preempt(1) == 8
    assert manager.seq_lens.tolist() == [9, 0, 0, 0]
    assert manager.num_free_blocks == 7


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn], ids=str)
def test_swapped_sequence_comes_back(dtype, device):
    manager = make_manager(device, dtype=dtype)
    manager.add_sequence(0, 9)
    manager.add_sequence(1, 6)
    for cache in manager.caches:
        cache.copy_(torch.randn(cache.shape))
    blocks = manager.seq_block_mapping[0]
    before = [cache[blocks].float().cpu() for cache in manager.caches]
    manager.swap_out(0)
    assert manager.num_free_blocks == 8
    manager.add_sequence(2, 8)
    for cache in manager.caches:
        cache[manager.seq_block_mapping[2]] = torch.zeros_like(cache[:2])
    manager.swap_in(0)
    assert manager.seq_lens.tolist() == [9, 6, 8, 0]
    back = manager.seq_block_mapping[0]
    assert back != blocks
    for cache, wanted in zip(manager.caches, before, strict=True):
        assert torch.equal(cache[back].float().cpu(), wanted)


def test_a_failure_to_swap_in_changes_nothing(monkeypatch):
    manager = make_manager()
    manager.add_sequence(0, 9)
    manager.swap_out(0)
    before = state(manager)

    def fail(*_):
        raise torch.OutOfMemoryError

    with monkeypatch.context() as patch:
        patch.setattr(swap, "load", fail)
        for _ in range(2):
            with pytest.raises(torch.OutOfMemoryError):
                manager.swap_in(0)
            assert state(manager) == before
            assert manager.num_free_blocks == 10
    manager.swap_in(0)
    assert manager.seq_lens.tolist() == [9, 0, 0, 0]


def test_swapped_sequence_waits(device):
    """Nothing but swapping it in, when there is room, and freeing it is possible."""
    manager = make_manager(device)
    manager.add_sequence(0, 9)
    manager.swap_out(0)
    manager.add_sequence(1, 32)
    before = state(manager)
    for call in (
        lambda: manager.append(0),
        lambda: manager.step([1, 0]),
        lambda: manager.reserve(0, 1),
        lambda: manager.truncate(0, 0),
        lambda: manager.share(0, [1]),
        lambda: manager.preempt(0),
        lambda: manager.fork(0, 2),
        lambda: manager.swap_out(0),
    ):
        with pytest.raises(ValueError, match="a sequence that is not swapped out, got 0"):
            call()
    with pytest.raises(OutOfBlocks, match="3 needed, 2 free"):
        manager.swap_in(0)
    with pytest.raises(ValueError, match="a sequence that was swapped out, got 1"):
        manager.swap_in(1)
    assert state(manager) == before
    manager.free_sequence(0)
    manager.add_sequence(0, 8)
    with pytest.raises(ValueError, match="that was swapped out, got 0"):
        manager.swap_in(0)


def test_a_swapped_sequence_is_in_no_batch():
    manager = make_manager()
    manager.add_sequence(0, 9)
    manager.swap_out(0)
    for call in (manager.batch, manager.slot_mapping):
        with pytest.raises(ValueError, match="a sequence that is not swapped out, got 0"):
            call([0], 0)


def test_empty_sequence_is_swapped():
    manager = make_manager()
    manager.add_sequence(0, 0)
    manager.swap_out(0)
    manager.swap_in(0)
    manager.append(0)


def test_watermark_is_kept_back():
    manager = make_manager(watermark=3)
    manager.add_sequence(0, 4)
    assert manager.can_allocate(24)
    assert not manager.can_allocate(25)


@pytest.mark.parametrize("made_in", [True, False], ids=["made inside", "made outside"])
def test_inference_mode_comes_and_goes(made_in, device):
    """Whatever was made there is written outside of it, and the other way round."""
    with torch.inference_mode(made_in):
        manager = make_manager(device)
    for inside in (True, False, True):
        with torch.inference_mode(inside):
            exercise_copies(manager)
            manager.swap_out(0)
        with torch.inference_mode(not inside):
            manager.swap_in(0)
            key = torch.randn(3, 2, 8, device=device)
            ops.write_kv(key, key, manager.caches[0], manager.step(range(3)).slot_mapping)
            assert manager.seq_lens.tolist()[:3] == [8, 8, 9]
            for seq_id in range(3):
                manager.free_sequence(seq_id)


@pytest.mark.parametrize("first", [True, False], ids=["first inside", "first outside"])
def test_steps_in_and_out_of_inference_mode(first):
    """The first makes the tensors; the meta device takes copies as a GPU does."""
    manager = make_manager("meta")
    manager.add_sequence(0, 1)
    for inside in (first, not first):
        with torch.inference_mode(inside):
            manager.step([0])


def test_compiled_step_reads_the_same_tensors():
    manager = make_manager(num_layers=1)
    reference = make_manager(num_layers=1)
    torch.manual_seed(0)
    for seq_id in range(3):
        manager.add_sequence(seq_id, seq_id)
        reference.add_sequence(seq_id, seq_id)

    def step(query, key, cache, batch):
        ops.write_kv(key, key, cache, batch.slot_mapping)
        return ops.attention(query, cache, batch.block_table, batch.seq_lens)

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=True)
    counters.clear()
    for turn in range(9):
        ids = [2, 0, 1][: 3 - turn % 2]
        query, key = torch.randn(2, len(ids), 2, 8).unbind()
        out = compiled(query, key, manager.caches[0], manager.step(ids))
        reference.append(ids)
        wanted = step(query, key, reference.caches[0], reference.batch(ids))
        torch.testing.assert_close(out, wanted)
    assert counters["stats"]["unique_graphs"] == 1


class Step(torch.nn.Module):
    """Writes new tokens and attends, as a model's layer does; rows of any number."""

    def __init__(self, kv_cache):
        super().__init__()
        self.register_buffer("kv_cache", kv_cache)

    def forward(self, query, key, batch: Batch):
        ops.write_kv(key, key, self.kv_cache, batch.slot_mapping)
        return ops.attention(query, self.kv_cache, batch.block_table, batch.seq_lens)


def make_step(num_seqs: int):
    manager = make_manager(num_layers=1, num_sequences=5)
    for seq_id in range(num_seqs):
        manager.add_sequence(seq_id, 2 + seq_id)
    query, key = torch.randn(2, num_seqs, 2, 8).unbind()
    return manager.caches[0], (query, key, manager.batch(range(num_seqs)))


def test_a_module_that_takes_a_batch_is_exported():
    torch.manual_seed(0)
    cache, example = make_step(3)
    rows = {0: torch.export.Dim("rows", min=2, max=64)}
    by_batch = [rows] * 4  # all but query_start_loc
    program = torch.export.export(Step(cache), example, dynamic_shapes=(rows, rows, by_batch))
    exported = program.module()
    for num_seqs in (2, 4):
        cache, inputs = make_step(num_seqs)
        exported.load_state_dict({"kv_cache": cache})
        torch.testing.assert_close(exported(*inputs), Step(cache)(*inputs))


def test_a_compiled_module_takes_batches_of_any_size():
    torch.manual_seed(0)
    cache, _ = make_step(1)
    step = Step(cache)
    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(step, fullgraph=True, dynamic=True)
    for num_seqs in (3, 4, 5):  # none of them the number of heads, for which 2 would stand
        _, inputs = make_step(num_seqs)
        torch.testing.assert_close(compiled(*inputs), step(*inputs))
    assert counters["stats"]["unique_graphs"] == 1

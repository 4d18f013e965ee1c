"""PagedAttentionManager: its tensors, and decoding over the cache it owns."""

from __future__ import annotations

import pytest
import torch
from conftest import assert_accurate
from torch._dynamo.utils import counters
from torch.nn.functional import scaled_dot_product_attention

from paged_ops import OutOfBlocks, PagedAttentionManager, ops


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


def test_empty_batch():
    batch = make_manager().batch([], [])
    assert batch.block_table.shape == (0, 10)
    assert batch.query_start_loc.tolist() == [0]
    assert batch.slot_mapping.shape == (0,)


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
        (lambda m: m.free_sequence(5), ValueError, "got 5"),
        (lambda m: m.fork(5, 6), ValueError, "got 5"),
        (lambda m: m.fork(0, 0), ValueError, "seq_id must be new"),
        (lambda m: m.batch([5]), ValueError, "got 5"),
        (lambda m: m.batch([0], 6), ValueError, "from 0 to the length 5"),
        (lambda m: m.batch([0], [1, 1]), ValueError, "one entry for each of the 1 sequences"),
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
    ],
)
def test_constructor_refuses(name, value):
    with pytest.raises(ValueError, match=f"{name} must be .*, got {value}"):
        make_manager(**{name: value})


def test_can_allocate():
    manager = make_manager()
    assert manager.can_allocate(40)
    assert not manager.can_allocate(41)
    manager.add_sequence(0, 1)
    assert not manager.can_allocate(40)
    assert manager.num_free_blocks == 9


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

"""What compiled graphs do with the operators, and what opcheck cannot see of it.

opcheck passes an operator whose write is lost or doubled under torch.compile, and one whose cache
is copied at every call: the tests here look at the cache afterwards and at the generated code.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
import torch
from cases import LAYOUTS, new_cache
from expecttest import assert_expected_inline
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend, EagerAndRecordGraphs, normalize_gm
from torch._inductor.utils import fresh_inductor_cache, run_and_get_code

from paged_ops import ops

NUM_LAYERS, NUM_BLOCKS, BLOCK_SIZE, NUM_KV_HEADS, HEAD_SIZE = 3, 64, 4, 2, 16
CACHE_NUMEL = NUM_BLOCKS * 2 * BLOCK_SIZE * NUM_KV_HEADS * HEAD_SIZE


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch.manual_seed(0)
    torch._dynamo.reset()
    with fresh_inductor_cache(), torch.no_grad():
        yield
    torch._dynamo.reset()


def decode_step(
    hidden: Tensor, caches: list[Tensor], block_table: Tensor, seq_lens: Tensor, slots: Tensor
) -> Tensor:
    """A decoder's attention without its matrices; K and V of a layer depend on the one before."""
    for kv_cache in caches:
        key, value = hidden[:, :NUM_KV_HEADS] * 0.5, hidden[:, :NUM_KV_HEADS] + 1
        ops.write_kv(key, value, kv_cache, slots)
        hidden = hidden + ops.attention(hidden, kv_cache, block_table, seq_lens).sin()
    return hidden


def make_batch(num_seqs: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Each sequence at its own length, its newest token in its own slot."""
    hidden = torch.randn(num_seqs, 2 * NUM_KV_HEADS, HEAD_SIZE, device=device)
    blocks = torch.arange(num_seqs, dtype=torch.int32) % NUM_BLOCKS
    seq_lens = torch.arange(num_seqs, dtype=torch.int32) % BLOCK_SIZE + 1
    slots = blocks.long() * BLOCK_SIZE + seq_lens - 1
    if num_seqs > NUM_BLOCKS:  # more sequences than blocks: the rest is padding
        slots[NUM_BLOCKS:], seq_lens[NUM_BLOCKS:] = -1, 0
    # Not a view: guards would look at the size of its base.
    block_table = blocks[:, None].clone()
    return hidden, block_table.to(device), seq_lens.to(device), slots.to(device)


def run(step, num_seqs: int, caches: list[Tensor], device: torch.device) -> Tensor:
    hidden, block_table, seq_lens, slots = make_batch(num_seqs, device)
    return step(hidden, caches, block_table, seq_lens, slots)


def layer_caches(layout: str, device: torch.device) -> list[Tensor]:
    """One cache for each layer, in storage of its own or, for "stacked", all in one allocation."""
    if layout == "stacked":
        stack = torch.randn(NUM_LAYERS, NUM_BLOCKS, 2, BLOCK_SIZE, NUM_KV_HEADS, HEAD_SIZE)
        return list(stack.to(device).unbind())
    shape = (NUM_BLOCKS, BLOCK_SIZE, NUM_KV_HEADS, HEAD_SIZE)
    caches = [new_cache(layout, *shape, torch.float32).to(device) for _ in range(NUM_LAYERS)]
    return [cache.copy_(torch.randn_like(cache)) for cache in caches]


def clones(caches: list[Tensor]) -> list[Tensor]:
    """The same values with the same strides, and the same sharing of one storage."""
    storages: dict[int, Tensor] = {}
    result = []
    for cache in caches:
        storage = cache.untyped_storage()
        if storage.data_ptr() not in storages:
            whole = torch.empty(0, dtype=cache.dtype, device=cache.device).set_(storage)
            storages[storage.data_ptr()] = whole.clone()
        whole = storages[storage.data_ptr()]
        result.append(whole.as_strided(cache.shape, cache.stride(), cache.storage_offset()))
    return result


def check_writes(compiled, layout: str, device: torch.device) -> None:
    """Of a step that is compiled for its first number of sequences, then for any."""
    caches = layer_caches(layout, device)
    eager_caches = clones(caches)
    for num_seqs in (3, 5, 8):
        actual = run(torch.manual_seed(num_seqs) and compiled, num_seqs, caches, device)
        wanted = run(torch.manual_seed(num_seqs) and decode_step, num_seqs, eager_caches, device)
        torch.testing.assert_close(actual, wanted)
        for cache, eager_cache in zip(caches, eager_caches, strict=True):
            torch.testing.assert_close(cache, eager_cache)


@pytest.mark.parametrize("layout", [*LAYOUTS, "stacked"])
def test_writes_are_right_under_aot_autograd(layout, device):
    check_writes(torch.compile(decode_step, backend="aot_eager", fullgraph=True), layout, device)


def large_buffers(code: str) -> list[str]:
    """Allocations in Inductor's code of a cache's size or more."""
    shapes = re.findall(r"empty_strided\w*\(\(([\d, ]*)\)", code)
    sizes = [[int(n) for n in shape.split(",") if n.strip()] for shape in shapes]
    return [str(size) for size in sizes if torch.Size(size).numel() >= CACHE_NUMEL]


@pytest.mark.parametrize("layout", [*LAYOUTS, "stacked"])
def test_generated_code_writes_in_place(layout, device):
    """The cache holds what it should, and the code allocates none."""
    compiled = torch.compile(decode_step, fullgraph=True)
    _, codes = run_and_get_code(check_writes, compiled, layout, device)
    assert len(codes) == 2
    for code in codes:
        assert "empty_strided" in code, "the pattern no longer finds allocations"
        assert large_buffers(code) == []
        assert code.count("torch.ops.paged.write_kv.default(") == NUM_LAYERS
        assert "clone" not in code


def test_the_search_for_large_buffers_finds_one():
    def double(cache: Tensor) -> Tensor:
        return torch.ops.aten.sort(cache * 2)[0]

    _, (code,) = run_and_get_code(torch.compile(double), torch.randn(CACHE_NUMEL))
    assert large_buffers(code)


def test_copy_blocks_and_outputs_are_right_under_compile(device):
    def step(kv_cache: Tensor, pairs: Tensor, query: Tensor, table: Tensor, lens: Tensor) -> Tensor:
        ops.copy_blocks(kv_cache, pairs)
        out = torch.empty_like(query)
        ops.attention_out(query, kv_cache, table, lens, out=out)
        other_out, lse = ops.attention_lse(query, kv_cache, table, lens)
        merged, _ = ops.merge_states(out, lse, other_out, lse)
        v1 = torch.empty_like(query)
        ops.paged_attention_v1(v1, query, kv_cache[:, 0], kv_cache[:, 1], table, lens)
        return merged + v1

    (cache, *_) = layer_caches("block_kv", device)
    (eager_cache,) = clones([cache])
    pairs = torch.tensor([[1, 0], [3, 2]], device=device)
    query, table, lens, _ = make_batch(4, device)
    compiled = torch.compile(step, fullgraph=True)
    wanted = step(eager_cache, pairs, query, table, lens)
    torch.testing.assert_close(compiled(cache, pairs, query, table, lens), wanted)
    assert torch.equal(cache, eager_cache)


def test_captured_graph():
    backend = EagerAndRecordGraphs()
    caches = layer_caches("block_kv", torch.device("cpu"))[:1]
    run(torch.compile(decode_step, backend=backend, fullgraph=True), 4, caches, torch.device("cpu"))
    (graph,) = backend.graphs
    assert_expected_inline(
        normalize_gm(graph.print_readable(print_output=False)),
        """\
class GraphModule(torch.nn.Module):
    def forward(self, L_hidden_: "f32[4, 4, 16]", L_caches_0_: "f32[64, 2, 4, 2, 16]", L_slots_: "i64[4]", L_block_table_: "i32[4, 1]", L_seq_lens_: "i32[4]"):
        l_hidden_ = L_hidden_
        l_caches_0_ = L_caches_0_
        l_slots_ = L_slots_
        l_block_table_ = L_block_table_
        l_seq_lens_ = L_seq_lens_

        getitem: "f32[4, 2, 16]" = l_hidden_[(slice(None, None, None), slice(None, 2, None))]
        key: "f32[4, 2, 16]" = getitem * 0.5;  getitem = None
        getitem_1: "f32[4, 2, 16]" = l_hidden_[(slice(None, None, None), slice(None, 2, None))]
        value: "f32[4, 2, 16]" = getitem_1 + 1;  getitem_1 = None

        write_kv_default = torch.ops.paged.write_kv.default(key, value, l_caches_0_, l_slots_);  key = value = l_slots_ = write_kv_default = None

        attention_default: "f32[4, 4, 16]" = torch.ops.paged.attention.default(l_hidden_, l_caches_0_, l_block_table_, l_seq_lens_, None);  l_caches_0_ = l_block_table_ = l_seq_lens_ = None

        sin: "f32[4, 4, 16]" = attention_default.sin();  attention_default = None
        hidden: "f32[4, 4, 16]" = l_hidden_ + sin;  l_hidden_ = sin = None
        return (hidden,)
""",
    )


def test_one_compile_for_every_batch_size(device):
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(decode_step, backend=counter, fullgraph=True, dynamic=True)
    caches = layer_caches("block_kv", device)
    eager_caches = clones(caches)
    compiles = set()
    for num_seqs in (7, 1, 2, 3, 4, 16, 31, 64, 100, 256):
        batch = make_batch(num_seqs, device)
        for tensor in batch:
            # Without it PyTorch compiles the size 1 apart.
            torch._dynamo.decorators.mark_unbacked(tensor, 0)
        hidden, block_table, seq_lens, slots = batch
        actual = compiled(hidden, caches, block_table, seq_lens, slots)
        wanted = decode_step(hidden, eager_caches, block_table, seq_lens, slots)
        torch.testing.assert_close(actual, wanted)
        compiles.add(counter.frame_count)
    assert len(compiles) == 1


class Decoder(nn.Module):
    """decode_step with the caches as buffers, as a module that is exported has them."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        for i, cache in enumerate(layer_caches("block_kv", device)):
            self.register_buffer(f"cache_{i}", cache)

    def forward(
        self, hidden: Tensor, block_table: Tensor, seq_lens: Tensor, slots: Tensor
    ) -> Tensor:
        return decode_step(hidden, list(self.buffers()), block_table, seq_lens, slots)


def export(module: Decoder, device: torch.device) -> torch.export.ExportedProgram:
    batch = torch.export.Dim("batch", min=1, max=512)
    shapes = tuple({0: batch} for _ in range(4))
    return torch.export.export(module, make_batch(4, device), dynamic_shapes=shapes)


def test_export(device):
    module = Decoder(device)
    program = export(module, device).run_decompositions()
    exported = program.module()
    for num_seqs in (2, 9):
        batch = make_batch(num_seqs, device)
        torch.testing.assert_close(exported(*batch), module(*batch))
    for exported_cache, cache in zip(exported.buffers(), module.buffers(), strict=True):
        torch.testing.assert_close(exported_cache, cache)


def test_aot_inductor(device, tmp_path):
    module = Decoder(device)
    package = torch._inductor.aoti_compile_and_package(
        export(module, device), package_path=str(tmp_path / "decoder.pt2")
    )
    loaded = torch._inductor.aoti_load_package(package)
    for num_seqs in (4, 9, 4):  # the caches live on between the calls
        batch = make_batch(num_seqs, device)
        torch.testing.assert_close(loaded(*batch), module(*batch))


@pytest.mark.gpu
def test_cuda_graphs_are_not_skipped():
    from torch._dynamo.utils import counters

    device = torch.device("cuda")
    module, eager = Decoder(device), Decoder(device)
    eager.load_state_dict(module.state_dict())
    compiled = torch.compile(module, mode="reduce-overhead", fullgraph=True)
    for _ in range(8):
        batch = make_batch(4, device)
        torch.compiler.cudagraph_mark_step_begin()
        torch.testing.assert_close(compiled(*batch), eager(*batch))
    assert counters["inductor"]["cudagraph_skips"] == 0
    for cache, eager_cache in zip(module.buffers(), eager.buffers(), strict=True):
        torch.testing.assert_close(cache, eager_cache)


@pytest.mark.gpu
def test_a_captured_cuda_graph_replays_with_other_lengths():
    device = torch.device("cuda")
    caches = layer_caches("block_kv", device)
    eager_caches = clones(caches)
    static = make_batch(6, device)
    run_static = lambda: decode_step(static[0], caches, *static[1:])  # noqa: E731
    run_static()
    decode_step(static[0], eager_caches, *static[1:])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run_static()
    for shift in range(1, 4):
        hidden, block_table, seq_lens, slots = make_batch(6, device)
        seq_lens, slots = seq_lens.roll(shift), slots.roll(shift)
        block_table = block_table.roll(shift, 0)
        for kept, new in zip(static, (hidden, block_table, seq_lens, slots), strict=True):
            kept.copy_(new)
        graph.replay()
        wanted = decode_step(hidden, eager_caches, block_table, seq_lens, slots)
        torch.testing.assert_close(out, wanted)

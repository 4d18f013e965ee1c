// paged_ops._block_manager: names, keyword arguments and exceptions; the types stand in
// paged_ops/_block_manager.pyi.
//
// Arguments are converted with the GIL, then it is released: a method waits for the manager's lock
// without it, so that no two threads can wait for each other.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "block_manager.h"
#include "python_arrays.h"

namespace py = pybind11;

namespace paged_ops {
namespace {

using Pairs = std::vector<std::pair<int32_t, int32_t>>;
constexpr char kSeqIds[] = "seq_ids", kTokens[] = "tokens", kNumTokens[] = "num_tokens",
               kNumNewTokens[] = "num_new_tokens";
using SeqIds = Integers<kSeqIds>;
using TokenArray = Integers<kTokens, true>;
using Counts = Integers<kNumTokens>;
using NewTokens = Integers<kNumNewTokens>;
using ReleaseGil = py::call_guard<py::gil_scoped_release>;

Pairs to_pairs(const std::vector<BlockPair>& copies) {
  Pairs pairs;
  for (const BlockPair& pair : copies) pairs.emplace_back(pair.source, pair.destination);
  return pairs;
}

Pairs append_each(BlockManager& manager, const SeqIds& seq_ids, const Counts& counts) {
  return to_pairs(manager.append(seq_ids.span(), counts.span()));
}

Pairs append_equally(BlockManager& manager, const SeqIds& seq_ids, int64_t num_tokens) {
  return to_pairs(manager.append(seq_ids.span(), num_tokens));
}

Pairs reserve(BlockManager& manager, const SeqIds& seq_ids, int64_t num_tokens) {
  return to_pairs(manager.reserve(seq_ids.span(), num_tokens));
}

int64_t lookup(const BlockManager& manager, const TokenArray& tokens, int64_t salt) {
  return manager.lookup(tokens.span(), salt);
}

int64_t share(BlockManager& manager, int64_t seq_id, const TokenArray& tokens, int64_t salt) {
  return manager.share(seq_id, tokens.span(), salt);
}

int64_t publish(BlockManager& manager, int64_t seq_id, const TokenArray& tokens, int64_t salt) {
  return manager.publish(seq_id, tokens.span(), salt);
}

int64_t pin(BlockManager& manager, const TokenArray& tokens, int64_t salt) {
  return manager.pin(tokens.span(), salt);
}

int64_t unpin(BlockManager& manager, const TokenArray& tokens, int64_t salt) {
  return manager.unpin(tokens.span(), salt);
}

template <typename T>
py::bytearray to_bytes(const std::vector<T>& numbers) {
  return {reinterpret_cast<const char*>(numbers.data()), numbers.size() * sizeof(T)};
}

py::tuple batch(const BlockManager& manager, const SeqIds& seq_ids, const NewTokens& num_new_tokens,
                int64_t max_blocks) {
  const Batch batch = [&] {
    const py::gil_scoped_release released;
    return manager.batch(seq_ids.span(), num_new_tokens.span(), max_blocks);
  }();
  return py::make_tuple(to_bytes(batch.block_table), to_bytes(batch.seq_lens),
                        to_bytes(batch.query_start_loc), to_bytes(batch.slot_mapping),
                        to_bytes(batch.positions));
}

// StepBuffers that keep the arrays alive which they write.
class ArrayStepBuffers {
 public:
  ArrayStepBuffers(py::handle block_table, py::handle seq_lens, py::handle slot_mapping,
                   py::handle positions)
      : block_table_(block_table, kFlags),
        seq_lens_(seq_lens, kFlags),
        slot_mapping_(slot_mapping, kFlags),
        positions_(positions, kFlags) {
    require("block_table", block_table_, 2, sizeof(int32_t));
    require("seq_lens", seq_lens_, 1, sizeof(int32_t));
    require("slot_mapping", slot_mapping_, 1, sizeof(int64_t));
    require("positions", positions_, 1, sizeof(int64_t));
    const int64_t max_rows = (*block_table_).shape[0];
    buffers_ = {max_rows,
                (*block_table_).shape[1],
                static_cast<int32_t*>((*block_table_).buf),
                static_cast<int32_t*>((*seq_lens_).buf),
                static_cast<int64_t*>((*slot_mapping_).buf),
                static_cast<int64_t*>((*positions_).buf),
                std::vector<StepBuffers::Row>(max_rows),
                max_rows};
  }

  StepBuffers* get() { return &buffers_; }

 private:
  static constexpr int kFlags = PyBUF_ND | PyBUF_FORMAT | PyBUF_WRITABLE;

  void require(const std::string& name, const BufferView& view, int dimensions, int64_t bytes) {
    const Py_buffer& array = *view;
    const bool fits = array.obj != nullptr && array.ndim == dimensions &&
                      view.holds_integers(bytes) && array.shape[0] == (*block_table_).shape[0];
    if (!fits) {
      throw std::invalid_argument(
          name + " must be a writable, contiguous array of int" + std::to_string(8 * bytes) +
          (dimensions == 2 ? " [rows, max_blocks]" : " [rows], with the rows of block_table"));
    }
  }

  BufferView block_table_, seq_lens_, slot_mapping_, positions_;
  StepBuffers buffers_;
};

Pairs step(BlockManager& manager, const SeqIds& seq_ids, ArrayStepBuffers& buffers) {
  return to_pairs(manager.step(seq_ids.span(), buffers.get()));
}

py::dict state(const BlockManager& manager) {
  using namespace py::literals;
  const State state = [&] {
    const py::gil_scoped_release released;
    return manager.state();
  }();
  const PrefixStatistics& prefix = state.prefix;
  py::dict sequences;
  for (const SequenceState& sequence : state.sequences) {
    sequences[py::int_(sequence.seq_id)] =
        py::dict("length"_a = sequence.length, "published_blocks"_a = sequence.published_blocks,
                 "blocks"_a = sequence.blocks);
  }
  return py::dict(
      "num_blocks"_a = manager.num_blocks(), "block_size"_a = manager.block_size(),
      "watermark"_a = manager.watermark(), "num_free_blocks"_a = state.num_free_blocks,
      "num_evictable_blocks"_a = state.num_evictable_blocks,
      "num_cached_blocks"_a = state.num_cached_blocks,
      "num_pinned_blocks"_a = state.num_pinned_blocks,
      "prefix"_a = py::dict("shares"_a = prefix.shares, "tokens_asked"_a = prefix.tokens_asked,
                            "tokens_found"_a = prefix.tokens_found,
                            "blocks_published"_a = prefix.blocks_published,
                            "blocks_evicted"_a = prefix.blocks_evicted),
      "sequences"_a = sequences);
}

// The Python exception carries the figures as attributes.
void translate_out_of_blocks(py::module_& m) {
  PYBIND11_CONSTINIT static py::gil_safe_call_once_and_store<py::object> type;
  type.call_once_and_store_result(
      [&] { return py::exception<OutOfBlocks>(m, "OutOfBlocks", PyExc_RuntimeError); });
  py::register_exception_translator([](std::exception_ptr pointer) {
    try {
      if (pointer) std::rethrow_exception(pointer);
    } catch (const OutOfBlocks& error) {
      const py::object& exception_type = type.get_stored();
      const py::object instance = exception_type(error.what());
      instance.attr("needed") = error.needed;
      instance.attr("free") = error.free;
      instance.attr("evictable") = error.evictable;
      PyErr_SetObject(exception_type.ptr(), instance.ptr());
    }
  });
}

void bind_sequences(py::class_<BlockManager>& type) {
  const py::arg seq_id("seq_id"), seq_ids("seq_ids"), num_tokens("num_tokens");
  type.def("allocate", &BlockManager::allocate, seq_id, num_tokens, ReleaseGil())
      .def("can_allocate", &BlockManager::can_allocate, num_tokens, ReleaseGil())
      .def("append", &append_equally, seq_ids, py::arg("num_tokens") = 1, ReleaseGil())
      .def("append", &append_each, seq_ids, num_tokens, ReleaseGil())
      .def("reserve", &reserve, seq_ids, num_tokens, ReleaseGil())
      .def("truncate", &BlockManager::truncate, seq_id, num_tokens, ReleaseGil())
      .def("fork", &BlockManager::fork, py::arg("parent_id"), py::arg("child_id"), ReleaseGil())
      .def("preempt", &BlockManager::preempt, seq_id, ReleaseGil())
      .def("free", &BlockManager::free, seq_id, ReleaseGil())
      .def("step", &step, seq_ids, py::arg("buffers"), ReleaseGil())
      .def("batch", &batch, seq_ids, py::arg("num_new_tokens"), py::arg("max_blocks"));
}

void bind_prefixes(py::class_<BlockManager>& type) {
  const py::arg seq_id("seq_id"), tokens("tokens");
  const py::arg_v salt = py::arg("salt") = 0;
  type.def("lookup", &lookup, tokens, salt, ReleaseGil())
      .def("share", &share, seq_id, tokens, salt, ReleaseGil())
      .def("publish", &publish, seq_id, tokens, salt, ReleaseGil())
      .def("pin", &pin, tokens, salt, ReleaseGil())
      .def("unpin", &unpin, tokens, salt, ReleaseGil())
      .def("reset_prefix_cache", &BlockManager::reset_prefix_cache, ReleaseGil());
}

void bind_inspection(py::class_<BlockManager>& type) {
  const py::arg seq_id("seq_id");
  const auto locking = [](int64_t (BlockManager::*count)() const) {
    return py::cpp_function(count, ReleaseGil());
  };
  type.def("length", &BlockManager::length, seq_id, ReleaseGil())
      .def("blocks", &BlockManager::blocks, seq_id, ReleaseGil())
      .def("ref_count", &BlockManager::ref_count, py::arg("block"), ReleaseGil())
      .def("blocks_for", &BlockManager::blocks_for, py::arg("num_tokens"))
      .def("state", &state)
      .def("check", &BlockManager::check, ReleaseGil())
      .def("__contains__", &BlockManager::contains, seq_id, ReleaseGil())
      .def_property_readonly("num_blocks", &BlockManager::num_blocks)
      .def_property_readonly("block_size", &BlockManager::block_size)
      .def_property_readonly("watermark", &BlockManager::watermark)
      .def_property_readonly("max_seq_len", &BlockManager::max_seq_len)
      .def_property_readonly("num_free_blocks", locking(&BlockManager::num_free_blocks))
      .def_property_readonly("num_evictable_blocks", locking(&BlockManager::num_evictable_blocks))
      .def_property_readonly("num_sequences", locking(&BlockManager::num_sequences));
}

}  // namespace
}  // namespace paged_ops

PYBIND11_MODULE(_block_manager, m) {
  using paged_ops::ArrayStepBuffers;
  using paged_ops::BlockManager;
  paged_ops::translate_out_of_blocks(m);
  py::class_<ArrayStepBuffers>(m, "StepBuffers")
      .def(py::init<py::handle, py::handle, py::handle, py::handle>(), py::arg("block_table"),
           py::arg("seq_lens"), py::arg("slot_mapping"), py::arg("positions"));
  py::class_<BlockManager> type(m, "BlockManager");
  type.def(py::init<int64_t, int64_t, int64_t, int64_t>(), py::arg("num_blocks"),
           py::arg("block_size"), py::arg("watermark") = 0,
           py::arg("max_seq_len") = paged_ops::kLongest);
  paged_ops::bind_sequences(type);
  paged_ops::bind_prefixes(type);
  paged_ops::bind_inspection(type);
}

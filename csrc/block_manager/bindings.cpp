// paged_ops._block_manager: names, keyword arguments and exceptions; the types stand in
// paged_ops/_block_manager.pyi.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <numeric>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "block_manager.h"

namespace py = pybind11;

namespace paged_ops {
namespace {

template <typename T>
std::pair<py::bytearray, T*> new_buffer(int64_t count) {
  // Zeros: what is not written is a block id that may be read without harm.
  const std::string zeros(static_cast<size_t>(count) * sizeof(T), '\0');
  py::bytearray buffer(zeros);
  return {buffer, reinterpret_cast<T*>(PyByteArray_AsString(buffer.ptr()))};
}

void check_step(const BlockManager& manager, const std::vector<int64_t>& seq_ids,
                const std::vector<int64_t>& num_new_tokens, int64_t max_blocks) {
  if (seq_ids.size() != num_new_tokens.size()) {
    throw std::invalid_argument("num_new_tokens must have one entry for each of the " +
                                std::to_string(seq_ids.size()) + " sequences, got " +
                                std::to_string(num_new_tokens.size()));
  }
  for (size_t i = 0; i < seq_ids.size(); ++i) {
    const int64_t length = manager.length(seq_ids[i]);
    if (num_new_tokens[i] < 0 || num_new_tokens[i] > length) {
      throw std::invalid_argument("num_new_tokens must be from 0 to the length " +
                                  std::to_string(length) + " of sequence " +
                                  std::to_string(seq_ids[i]) + ", got " +
                                  std::to_string(num_new_tokens[i]));
    }
    if (manager.blocks_for(length) > max_blocks) {
      throw std::invalid_argument("max_blocks must hold the " +
                                  std::to_string(manager.blocks_for(length)) +
                                  " blocks of sequence " + std::to_string(seq_ids[i]) + ", got " +
                                  std::to_string(max_blocks));
    }
  }
}

py::tuple step(const BlockManager& manager, const std::vector<int64_t>& seq_ids,
               const std::vector<int64_t>& num_new_tokens, int64_t max_blocks) {
  check_step(manager, seq_ids, num_new_tokens, max_blocks);
  const int64_t num_seqs = static_cast<int64_t>(seq_ids.size());
  const int64_t num_tokens =
      std::accumulate(num_new_tokens.begin(), num_new_tokens.end(), int64_t{0});
  const auto [block_table, block_table_data] = new_buffer<int32_t>(num_seqs * max_blocks);
  const auto [seq_lens, seq_lens_data] = new_buffer<int32_t>(num_seqs);
  const auto [query_start_loc, query_start_loc_data] = new_buffer<int32_t>(num_seqs + 1);
  const auto [slot_mapping, slot_mapping_data] = new_buffer<int64_t>(num_tokens);
  const auto [positions, positions_data] = new_buffer<int64_t>(num_tokens);
  manager.write_step(seq_ids, num_new_tokens,
                     {block_table_data, max_blocks, seq_lens_data, query_start_loc_data,
                      slot_mapping_data, positions_data});
  return py::make_tuple(block_table, seq_lens, query_start_loc, slot_mapping, positions);
}

std::vector<std::pair<int32_t, int32_t>> append(BlockManager& manager,
                                                const std::vector<int64_t>& seq_ids,
                                                int64_t num_tokens) {
  std::vector<std::pair<int32_t, int32_t>> pairs;
  for (const BlockPair& pair : manager.append(seq_ids, num_tokens)) {
    pairs.emplace_back(pair.source, pair.destination);
  }
  return pairs;
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
      PyErr_SetObject(exception_type.ptr(), instance.ptr());
    }
  });
}

}  // namespace
}  // namespace paged_ops

PYBIND11_MODULE(_block_manager, m) {
  using paged_ops::BlockManager;
  paged_ops::translate_out_of_blocks(m);
  py::class_<BlockManager>(m, "BlockManager")
      .def(py::init<int64_t, int64_t>(), py::arg("num_blocks"), py::arg("block_size"))
      .def("allocate", &BlockManager::allocate, py::arg("seq_id"), py::arg("num_tokens"))
      .def("append", &paged_ops::append, py::arg("seq_ids"), py::arg("num_tokens") = 1)
      .def("fork", &BlockManager::fork, py::arg("parent_id"), py::arg("child_id"))
      .def("free", &BlockManager::free, py::arg("seq_id"))
      .def("step", &paged_ops::step, py::arg("seq_ids"), py::arg("num_new_tokens"),
           py::arg("max_blocks"))
      .def("length", &BlockManager::length, py::arg("seq_id"))
      .def("blocks", &BlockManager::blocks, py::arg("seq_id"))
      .def("ref_count", &BlockManager::ref_count, py::arg("block"))
      .def("blocks_for", &BlockManager::blocks_for, py::arg("num_tokens"))
      .def("check", &BlockManager::check)
      .def("__contains__", &BlockManager::contains, py::arg("seq_id"))
      .def_property_readonly("num_blocks", &BlockManager::num_blocks)
      .def_property_readonly("block_size", &BlockManager::block_size)
      .def_property_readonly("num_free_blocks", &BlockManager::num_free_blocks)
      .def_property_readonly("num_sequences", &BlockManager::num_sequences);
}

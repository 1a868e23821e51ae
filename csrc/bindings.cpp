// kdkernels._codec: what Python data workers need without importing torch. Torch-free.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include "build_facts.gen.h"
#include "codec.h"
#include "codec_format.h"

namespace py = pybind11;
namespace codec = kd::codec;

namespace {

template <class T>
using Array = py::array_t<T, py::array::c_style>;

struct Bytes {
  const uint8_t* data;
  size_t size;
};

Bytes bytes_of(const py::buffer_info& info) {
  const bool flat = info.ndim == 1 && info.itemsize == 1 && (info.size == 0 || info.strides[0] == 1);
  if (!flat)
    throw py::type_error("block: must be contiguous bytes (bytes, memoryview or a numpy array of uint8)");
  return {static_cast<const uint8_t*>(info.ptr), static_cast<size_t>(info.size)};
}

py::str name_of(const std::string& name) {
  PyObject* text = PyUnicode_DecodeUTF8(name.data(), static_cast<Py_ssize_t>(name.size()), "strict");
  if (text) return py::reinterpret_steal<py::str>(text);
  PyErr_Clear();
  throw codec::Error("block: names of columns are damaged");
}

void require_rows(const char* name, py::ssize_t length, py::ssize_t rows) {
  if (length == rows) return;
  throw codec::BadArgument(std::string(name) + " = " + std::to_string(length) +
                           " numbers: must be one a row, " + std::to_string(rows));
}

py::bytes encode(const Array<int32_t>& ids, const Array<float>& log_probs, const Array<float>& log_tail,
                 uint64_t vocab_size, int bits, const py::dict& columns) {
  codec::Input input{};
  input.rows = static_cast<uint64_t>(ids.shape(0)), input.width = static_cast<uint64_t>(ids.shape(1));
  require_rows("log_tail", log_tail.shape(0), ids.shape(0));
  input.ids = ids.data(), input.log_probs = log_probs.data(), input.log_tail = log_tail.data();
  input.vocab = vocab_size, input.bits = bits;
  std::vector<Array<float>> kept;
  for (const auto& item : columns) {
    kept.push_back(py::cast<Array<float>>(item.second));
    input.columns.push_back({py::cast<std::string>(item.first), kept.back().data()});
    require_rows("columns", kept.back().shape(0), ids.shape(0));
  }
  std::vector<uint8_t> block;
  {
    const py::gil_scoped_release release;
    block = codec::encode(input);
  }
  return py::bytes(reinterpret_cast<const char*>(block.data()), block.size());
}

codec::Block open_released(const Bytes& bytes, bool verify) {
  const py::gil_scoped_release release;
  return codec::open(bytes.data, bytes.size, verify);
}

py::tuple decode(const py::buffer& data, const py::slice& rows, bool verify) {
  const py::buffer_info info = data.request();
  const codec::Block block = open_released(bytes_of(info), verify);
  py::ssize_t start = 0, stop = 0, step = 0, count = 0;
  if (!rows.compute(block.rows, &start, &stop, &step, &count)) throw py::error_already_set();
  const py::ssize_t width = block.width;
  py::array_t<int32_t> ids({count, width});
  py::array_t<float> log_probs({count, width}), log_tail(count);
  py::dict columns;
  codec::Output output{ids.mutable_data(), log_probs.mutable_data(), log_tail.mutable_data(), {}};
  for (const std::string& name : block.columns) {
    py::array_t<float> column(count);
    output.columns.push_back(column.mutable_data());
    columns[name_of(name)] = column;
  }
  {
    const py::gil_scoped_release release;
    codec::decode(block, static_cast<uint64_t>(start), step, static_cast<uint64_t>(count), output);
  }
  return py::make_tuple(ids, log_probs, log_tail, columns);
}

py::dict inspect(const py::buffer& data, bool verify) {
  const py::buffer_info info = data.request();
  const codec::Block block = open_released(bytes_of(info), verify);
  py::list columns;
  for (const std::string& name : block.columns) columns.append(name_of(name));
  py::dict facts;
  facts["rows"] = block.rows, facts["width"] = block.width, facts["vocab_size"] = block.vocab;
  facts["bits"] = block.bits, facts["nbytes"] = info.size, facts["max_error"] = block.max_error;
  facts["columns"] = py::tuple(columns), facts["id_bits"] = block.id_bits;
  return facts;
}

py::dict format_constants() {
  py::dict fields;
  fields["magic"] = unsigned{codec::kAtMagic}, fields["version"] = unsigned{codec::kAtVersion};
  fields["bits"] = unsigned{codec::kAtBits}, fields["columns"] = unsigned{codec::kAtColumns};
  fields["rows"] = unsigned{codec::kAtRows}, fields["width"] = unsigned{codec::kAtWidth};
  fields["vocab_size"] = unsigned{codec::kAtVocab}, fields["min_count"] = unsigned{codec::kAtMinCount};
  fields["count_bits"] = unsigned{codec::kAtCountBits},
  fields["offset_bits"] = unsigned{codec::kAtOffsetBits};
  fields["names_bytes"] = unsigned{codec::kAtNamesBytes}, fields["max_error"] = unsigned{codec::kAtMaxError};
  fields["payload_bits"] = unsigned{codec::kAtPayloadBits}, fields["id_bits"] = unsigned{codec::kAtIdBits};
  fields["offset_bias"] = unsigned{codec::kAtOffsetBias}, fields["nbytes"] = unsigned{codec::kAtTotalBytes};
  py::dict constants;
  constants["MAGIC"] = py::bytes(codec::kMagic, 4), constants["VERSION"] = codec::kVersion;
  constants["HEADER_BYTES"] = unsigned{codec::kHeaderBytes},
  constants["CHECKSUM_BYTES"] = codec::kChecksumBytes;
  constants["MAX_ROWS"] = codec::kMaxRows, constants["MAX_PAYLOAD_BITS"] = codec::kMaxPayloadBits;
  constants["MAX_VOCAB"] = codec::kMaxVocab, constants["MAX_ENTRIES_PER_BYTE"] = codec::kMaxEntriesPerByte;
  constants["RAW_ROW"] = codec::kRawRow, constants["MAX_QUANTISED_RANGE"] = codec::kMaxQuantisedRange;
  constants["fields"] = fields;
  return constants;
}

template <uint32_t checksum(const uint8_t*, size_t)>
uint32_t crc_of(const py::buffer& data) {
  const py::buffer_info info = data.request();
  const Bytes bytes = bytes_of(info);
  return checksum(bytes.data, bytes.size);
}

}  // namespace

PYBIND11_MODULE(_codec, m) {
  m.doc() = "Torch-free native helpers of kdkernels.";
  m.def(
      "build_facts", [] { return py::module_::import("json").attr("loads")(KD_BUILD_FACTS); },
      "What this build is: version, torch and compiler it was made with, instruction sets, CUDA, kernel "
      "digests.");
  py::register_exception<codec::Error>(m, "CodecError", PyExc_ValueError).doc() =
      "The bytes are not a block, or not one that this version reads, or they were damaged.";
  py::register_exception<codec::BadArgument>(m, "ArgumentError", PyExc_ValueError).doc() =
      "Something that cannot be encoded.";
  m.def("encode", &encode, "kdkernels.compression.codec.encode, arguments in its order.");
  m.def("decode", &decode, "(block, slice, verify) -> (ids, log_probs, log_tail, columns).");
  m.def("inspect", &inspect, "(block, verify) -> what the header says.");
  m.def("crc32c", &crc_of<codec::crc32c>, "CRC-32C of bytes.");
  m.def("crc32c_portable", &crc_of<codec::crc32c_portable>, "The same without the processor's instruction.");
  m.def("format_constants", &format_constants,
        "The format as compiled; kdkernels.compression.format says the same.");
}

// The Python face of the engine: names and sizes, releasing the GIL. Addresses come as integers (docs/architecture.md, decision 4);
// whoever calls has checked shapes, dtypes, strides and devices. What can be checked from sizes alone is checked here.
#include <nanobind/nanobind.h>
#include <nanobind/stl/array.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <array>
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

#include "cpu/engine.h"
#include "cpu/programs.h"
#include "gpu.h"
#include "stream.h"
#include "tensors.h"

namespace nb = nanobind;
using namespace ostinato;

namespace {

using Address = uintptr_t;
using Addresses = std::vector<Address>;
// steps, rows, batch, input, hidden, projection, directions
using SizeList = std::array<int64_t, 7>;

Cell cell_of(int cell) {
    if (!is_cell(cell))
        throw std::invalid_argument("cell must be 0.." + std::to_string(kCells - 1) + ", or what define_cell returned");
    return static_cast<Cell>(cell);
}

Dtype dtype_of(int dtype) {
    if (dtype < 0 || dtype >= kDtypes) throw std::invalid_argument("dtype must be 0.." + std::to_string(kDtypes - 1));
    return static_cast<Dtype>(dtype);
}

Sizes sizes_of(Cell cell, const SizeList& s, Address batch_sizes, bool recompute) {
    for (int64_t size : s)
        if (size < 0) throw std::invalid_argument("sizes must not be negative");
    if (s[4] < 1) throw std::invalid_argument("hidden must be positive");
    if (s[6] != 1 && s[6] != 2) throw std::invalid_argument("directions must be 1 or 2");
    const auto* counts = reinterpret_cast<const int64_t*>(batch_sizes);
    return {s[0], s[1], s[2], s[3], s[4], s[5], s[6], counts, traits_of(cell), recompute};
}

// Call: Forward or Backward. The arrays of call i begin i strides after those of the first.
template <class Call>
void run_models(int cell_number, int dtype_number, const SizeList& sizes, Address batch_sizes, int64_t models,
                const Addresses& first, const Addresses& strides, int threads, bool recompute) {
    const Cell cell = cell_of(cell_number);
    const Dtype dtype = dtype_of(dtype_number);
    Call call{};
    call.sizes = sizes_of(cell, sizes, batch_sizes, recompute);
    call.program = program_of(cell);
    const auto expected = static_cast<size_t>(count_arrays<Call>(call.sizes.directions));
    if (models < 0) throw std::invalid_argument("models must not be negative");
    if (first.size() != expected || (strides.size() != expected && !(models == 1 && strides.empty())))
        throw std::invalid_argument("expected " + std::to_string(expected) + " addresses, and a stride for each");
    nb::gil_scoped_release release;
    size_t next = 0;
    call.visit(call, [&](const Array&, auto, auto& p) { point(p, reinterpret_cast<void*>(first[next++])); });
    if (models == 1) return run(cell, dtype, call, threads);
    std::vector<Call> calls(static_cast<size_t>(models), call);
    for (size_t i = 1; i < calls.size(); i++) {
        next = 0;
        call.visit(calls[i], [&](const Array&, auto, auto& p) { p = moved(p, static_cast<int64_t>(i * strides[next++])); });
    }
    run_all(cell, dtype, calls.data(), models, threads);
}

using CodeTuple = std::tuple<std::vector<int>, std::vector<double>, int>;
CodeText text_of(const CodeTuple& code) { return {std::get<0>(code), std::get<1>(code), std::get<2>(code)}; }

// Name, rows, width, type, and whether the engine writes it.
using ArrayRow = std::tuple<std::string, std::string, std::string, std::string, bool>;

template <class Call>
std::vector<ArrayRow> arrays() {
    // In the order of the enums.
    constexpr const char* kRows[] = {"N", "D*B", "B", "", "", "", "", ""};
    constexpr const char* kWidths[] = {"1", "I", "I+n*H", "O", "H", "E*H", "D*O", "D*E*H"};
    constexpr const char* kTypes[] = {"value", "flag", "int64", "opaque"};
    std::vector<ArrayRow> found;
    Call call{};
    call.sizes.directions = 1;
    call.visit(call, [&](const Array& array, auto p, auto&) {
        const std::string rows = kRows[static_cast<int>(array.rows)];
        if (!found.empty() && std::get<0>(found.back()) == array.name) return;
        found.emplace_back(array.name, rows, rows.empty() ? "" : kWidths[static_cast<int>(array.width)],
                           kTypes[static_cast<int>(array.type)], !std::is_const_v<std::remove_pointer_t<decltype(p)>>);
    });
    return found;
}

std::vector<std::string> instruction_sets() {
    std::vector<std::string> names;
    for (int i = 0; const char* name = isa_name(i); i++) names.emplace_back(name);
    return names;
}

// `what` is how the caller knows the name.
void set_isa(const std::string& name, const char* what) {
    if (select_isa(name.c_str())) return;
    std::string known;
    for (const std::string& isa : instruction_sets()) known += (known.empty() ? "" : ", ") + isa;
    throw std::invalid_argument(std::string(what) + " must be one of " + known + " on this processor, got " + name);
}

// OSTINATO_NUM_THREADS, or 0 where it is not set.
int forced_threads() {
    const char* text = std::getenv("OSTINATO_NUM_THREADS");
    if (!text || !*text) return 0;
    char* end = nullptr;
    const long threads = std::strtol(text, &end, 10);
    if (*end || threads < 1 || threads > 256)
        throw std::invalid_argument("OSTINATO_NUM_THREADS must be a number from 1 to 256, got " + std::string(text));
    return static_cast<int>(threads);
}

}  // namespace

NB_MODULE(_core, m) {
    m.doc() = "The compiled engine: recurrent layers over raw addresses. Use ostinato.nn or ostinato.numpy instead.";
    const auto define_run = [&](const char* name, auto function, const char* doc) {
        m.def(name, function, nb::arg("cell"), nb::arg("dtype"), nb::arg("sizes"), nb::arg("batch_sizes"), nb::arg("models"),
              nb::arg("first"), nb::arg("strides"), nb::arg("threads"), nb::arg("recompute") = false, doc);
    };
    define_run(
        "forward", &run_models<Forward>,
        "Layers of one size forward. first: the addresses of the first one's dense arrays, in the order of arrays(False), 0 "
        "for an absent one, with weight_ih, weight_hh, bias_ih, bias_hh, weight_hr and numbers per unit of each direction for "
        "`weights`. "
        "strides: how many bytes lie from each to that of the next layer; [] for one layer alone.");
    define_run("backward", &run_models<Backward>,
               "Gradients of layers likewise, in the order of arrays(True). 0 for a gradient that is zero (in) or not wanted "
               "(out).");
    m.def(
        "arrays", [](bool backward) { return backward ? arrays<Backward>() : arrays<Forward>(); }, nb::arg("backward"),
        "The arrays of a call in the order of `first`: name, rows, width, type, and whether the engine writes it. Rows: N "
        "(those of all steps), D*B, B. Width, the numbers of a row: 1, I+n*H, O, E*H, D*O, D*E*H. Type: value (of the call's "
        "dtype), "
        "flag (a byte, 0 or 1), int64, opaque. Weights of all directions are one entry, and so are their gradients; their rows "
        "and width are empty, and those of reserve.");
    m.def(
        "reserve_bytes",
        [](int cell, int dtype, const SizeList& size_list, bool recompute) {
            const Cell number = cell_of(cell);
            return reserve_bytes(number, dtype_of(dtype), sizes_of(number, size_list, 0, recompute));
        },
        nb::arg("cell"), nb::arg("dtype"), nb::arg("sizes"), nb::arg("recompute") = false,
        "Bytes that forward keeps for backward.");
    m.def(
        "traits",
        [](int cell) {
            const Traits& t = traits_of(cell_of(cell));
            return std::make_tuple(t.gates, t.grads, t.saved, t.recomputed, t.has_c, t.projects, t.uses_output,
                                   t.uses_previous);
        },
        nb::arg("cell"),
        "Of a cell, in this order: gates, gradients of their products, values kept for backward, of these with recompute; "
        "whether it has c, may be projected, reads its output in backward, reads the last h beside weight_hh.");
    m.def("operations", &operations, "Names of what an own cell's program may do; an operation's number is its place.");
    m.def(
        "define_cell",
        [](const std::array<int, 5>& sizes, const std::vector<int>& joint, int saved, bool uses_output, bool uses_previous,
           const CodeTuple& forward, const CodeTuple& forward_keep, const CodeTuple& backward) {
            Traits t{};
            t.input_gates = sizes[0], t.gates = sizes[1], t.behind = sizes[2], t.parameters = sizes[3], t.drives = sizes[4];
            t.saved = saved, t.uses_output = uses_output, t.uses_previous = uses_previous;
            return define_cell(t, joint, text_of(forward), text_of(forward_keep), text_of(backward));
        },
        nb::arg("sizes"), nb::arg("joint"), nb::arg("saved"), nb::arg("uses_output"), nb::arg("uses_previous"),
        nb::arg("forward"), nb::arg("forward_keep"), nb::arg("backward"),
        "Adds an own cell and returns its number. sizes: gates of the input and of the state, states behind h, parameters and "
        "drives. joint: gates that take both products in one sum. A program is its code (five numbers for each instruction: "
        "operation, to, a, b, c), the numbers that stand in its first registers, and how many registers it has.");
    m.def("instruction_sets", &instruction_sets, "Instruction sets that this processor can run, best first.");
    m.def("isa", [] { return std::string(active_isa()); }, "The instruction set in use.");
    m.def(
        "set_isa", [](const std::string& name) { set_isa(name, "instruction set"); }, nb::arg("name"),
        "Uses another instruction set from now on, in every thread.");
    define_stream(m);
    define_tensors(m);
    define_gpu(m);
    m.attr("forced_threads") = forced_threads();
    if (const char* forced = std::getenv("OSTINATO_ISA"); forced && *forced) set_isa(forced, "OSTINATO_ISA");
}

// The Python face of the engine: names and sizes, releasing the GIL. Addresses come as integers (design, decision 4);
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
#include <vector>

#include "cpu/engine.h"
#include "tensors.h"

namespace nb = nanobind;
using namespace ostinato;

namespace {

using Address = uintptr_t;
// weight_ih, weight_hh, bias_ih, bias_hh, weight_hr of the first direction, then of the second; 0 where absent.
using Addresses = std::vector<Address>;
// steps, rows, batch, input, hidden, projection, directions
using SizeList = std::array<int64_t, 7>;
// lengths, resets, h, c
using CutList = std::array<Address, 4>;

template <class P = const void*>
P at(Address address) {
    return reinterpret_cast<P>(address);
}

Cell cell_of(int cell) {
    if (cell < 0 || cell >= kCells) throw std::invalid_argument("cell must be 0..3");
    return static_cast<Cell>(cell);
}

Dtype dtype_of(int dtype) {
    if (dtype < 0 || dtype >= kDtypes) throw std::invalid_argument("dtype must be 0..3");
    return static_cast<Dtype>(dtype);
}

Sizes sizes_of(const SizeList& s, Address batch_sizes) {
    for (int64_t size : s)
        if (size < 0) throw std::invalid_argument("sizes must not be negative");
    if (s[4] < 1) throw std::invalid_argument("hidden must be positive");
    if (s[6] != 1 && s[6] != 2) throw std::invalid_argument("directions must be 1 or 2");
    return {s[0], s[1], s[2], s[3], s[4], s[5], s[6], at<const int64_t*>(batch_sizes)};
}

Cuts cuts_of(const CutList& c) { return {at<const int64_t*>(c[0]), at<const uint8_t*>(c[1]), at(c[2]), at(c[3])}; }

template <class P>
void fill(Weights<P> (&out)[2], const Addresses& in, int64_t directions) {
    if (in.size() != static_cast<size_t>(5 * directions)) throw std::invalid_argument("expected 5 addresses per direction");
    for (int64_t d = 0; d < directions; d++) {
        const Address* a = in.data() + 5 * d;
        out[d] = {at<P>(a[0]), at<P>(a[1]), at<P>(a[2]), at<P>(a[3]), at<P>(a[4])};
    }
}

void layer_forward(int cell, int dtype, const SizeList& sizes, Address batch_sizes, Address x, Address h_0, Address c_0,
                   const Addresses& weights, Address y, Address h_n, Address c_n, Address reserve, int threads, bool recompute,
                   const CutList& cuts, Address cells) {
    Forward call{};
    call.sizes = sizes_of(sizes, batch_sizes);
    call.sizes.recompute = recompute;
    fill(call.weights, weights, call.sizes.directions);
    call.x = at(x), call.h_0 = at(h_0), call.c_0 = at(c_0);
    call.cuts = cuts_of(cuts), call.cells = at<void*>(cells);
    call.y = at<void*>(y), call.h_n = at<void*>(h_n), call.c_n = at<void*>(c_n), call.reserve = at<void*>(reserve);
    nb::gil_scoped_release release;
    forward(cell_of(cell), dtype_of(dtype), call, threads);
}

void layer_backward(int cell, int dtype, const SizeList& sizes, Address batch_sizes, Address x, Address h_0, Address c_0,
                    const Addresses& weights, Address y, Address reserve, Address dy, Address dh_n, Address dc_n, Address dx,
                    Address dh_0, Address dc_0, const Addresses& grads, int threads, bool recompute, const CutList& cuts,
                    Address dcut_h, Address dcut_c, Address dcells) {
    Backward call{};
    call.sizes = sizes_of(sizes, batch_sizes);
    call.sizes.recompute = recompute;
    fill(call.weights, weights, call.sizes.directions);
    fill(call.grads, grads, call.sizes.directions);
    call.x = at(x), call.h_0 = at(h_0), call.c_0 = at(c_0), call.y = at(y), call.reserve = at(reserve);
    call.cuts = cuts_of(cuts), call.dcut_h = at<void*>(dcut_h), call.dcut_c = at<void*>(dcut_c), call.dcells = at(dcells);
    call.dy = at(dy), call.dh_n = at(dh_n), call.dc_n = at(dc_n);
    call.dx = at<void*>(dx), call.dh_0 = at<void*>(dh_0), call.dc_0 = at<void*>(dc_0);
    nb::gil_scoped_release release;
    backward(cell_of(cell), dtype_of(dtype), call, threads);
}

// The arrays of several calls, one after the other as a call asks for them: that of call `index` begins so many strides (in
// bytes) after that of the first. 0 stands for an absent one.
class Stack {
public:
    Stack(const Addresses& first, const Addresses& strides, size_t expected) : first_(first), strides_(strides) {
        if (first.size() != expected || strides.size() != expected)
            throw std::invalid_argument("expected an address and a stride per array");
    }

    void begin(int64_t index) { index_ = index, next_ = 0; }

    template <class P = const void*>
    P take() {
        const size_t i = next_++;
        return at<P>(first_[i] ? first_[i] + static_cast<Address>(index_) * strides_[i] : 0);
    }

    template <class P>
    void take(Weights<P> (&out)[2], int64_t directions) {
        for (int64_t d = 0; d < directions; d++)
            for (P* weight : {&out[d].ih, &out[d].hh, &out[d].bias_ih, &out[d].bias_hh, &out[d].hr}) *weight = take<P>();
    }

    Cuts take_cuts() {
        Cuts cuts;
        cuts.lengths = take<const int64_t*>(), cuts.resets = take<const uint8_t*>();
        cuts.h = take(), cuts.c = take();
        return cuts;
    }

private:
    const Addresses &first_, &strides_;
    int64_t index_ = 0;
    size_t next_ = 0;
};

size_t count_of(int64_t models) {
    if (models < 0) throw std::invalid_argument("models must not be negative");
    return static_cast<size_t>(models);
}

void layers_forward(int cell, int dtype, const SizeList& size_list, Address batch_sizes, int64_t models, const Addresses& first,
                    const Addresses& strides, int threads, bool recompute) {
    Sizes sizes = sizes_of(size_list, batch_sizes);
    sizes.recompute = recompute;
    Stack arrays(first, strides, static_cast<size_t>(12 + 5 * sizes.directions));
    std::vector<Forward> calls(count_of(models));
    for (int64_t i = 0; i < models; i++) {
        Forward& call = calls[static_cast<size_t>(i)];
        call.sizes = sizes;
        arrays.begin(i);
        call.x = arrays.take(), call.h_0 = arrays.take(), call.c_0 = arrays.take();
        call.cuts = arrays.take_cuts();
        arrays.take(call.weights, sizes.directions);
        call.y = arrays.take<void*>(), call.h_n = arrays.take<void*>(), call.c_n = arrays.take<void*>();
        call.cells = arrays.take<void*>(), call.reserve = arrays.take<void*>();
    }
    nb::gil_scoped_release release;
    forward(cell_of(cell), dtype_of(dtype), calls.data(), models, threads);
}

void layers_backward(int cell, int dtype, const SizeList& size_list, Address batch_sizes, int64_t models,
                     const Addresses& first, const Addresses& strides, int threads, bool recompute) {
    Sizes sizes = sizes_of(size_list, batch_sizes);
    sizes.recompute = recompute;
    Stack arrays(first, strides, static_cast<size_t>(18 + 10 * sizes.directions));
    std::vector<Backward> calls(count_of(models));
    for (int64_t i = 0; i < models; i++) {
        Backward& call = calls[static_cast<size_t>(i)];
        call.sizes = sizes;
        arrays.begin(i);
        call.dy = arrays.take(), call.dh_n = arrays.take(), call.dc_n = arrays.take(), call.dcells = arrays.take();
        call.y = arrays.take(), call.reserve = arrays.take();
        call.x = arrays.take(), call.h_0 = arrays.take(), call.c_0 = arrays.take();
        call.cuts = arrays.take_cuts();
        arrays.take(call.weights, sizes.directions);
        call.dx = arrays.take<void*>(), call.dh_0 = arrays.take<void*>(), call.dc_0 = arrays.take<void*>();
        call.dcut_h = arrays.take<void*>(), call.dcut_c = arrays.take<void*>();
        arrays.take(call.grads, sizes.directions);
    }
    nb::gil_scoped_release release;
    backward(cell_of(cell), dtype_of(dtype), calls.data(), models, threads);
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
    m.def("layer_forward", &layer_forward, nb::arg("cell"), nb::arg("dtype"), nb::arg("sizes"), nb::arg("batch_sizes"),
          nb::arg("x"), nb::arg("h_0"), nb::arg("c_0"), nb::arg("weights"), nb::arg("y"), nb::arg("h_n"), nb::arg("c_n"),
          nb::arg("reserve"), nb::arg("threads"), nb::arg("recompute") = false, nb::arg("cuts") = CutList{},
          nb::arg("cells") = 0, "One layer forward. Addresses of dense arrays (csrc/cpu/engine.h), 0 for an absent one.");
    m.def("layer_backward", &layer_backward, nb::arg("cell"), nb::arg("dtype"), nb::arg("sizes"), nb::arg("batch_sizes"),
          nb::arg("x"), nb::arg("h_0"), nb::arg("c_0"), nb::arg("weights"), nb::arg("y"), nb::arg("reserve"), nb::arg("dy"),
          nb::arg("dh_n"), nb::arg("dc_n"), nb::arg("dx"), nb::arg("dh_0"), nb::arg("dc_0"), nb::arg("grads"),
          nb::arg("threads"), nb::arg("recompute") = false, nb::arg("cuts") = CutList{}, nb::arg("dcut_h") = 0,
          nb::arg("dcut_c") = 0, nb::arg("dcells") = 0,
          "Gradients of one layer. 0 for a gradient that is zero (in) or not wanted (out).");
    m.def("layers_forward", &layers_forward, nb::arg("cell"), nb::arg("dtype"), nb::arg("sizes"), nb::arg("batch_sizes"),
          nb::arg("models"), nb::arg("first"), nb::arg("strides"), nb::arg("threads"), nb::arg("recompute") = false,
          "Several layers of one size forward: for each array its address in the first and how many bytes lie between two. "
          "x, h_0, c_0, lengths, resets, h and c at a reset, weights, y, h_n, c_n, cells, reserve.");
    m.def("layers_backward", &layers_backward, nb::arg("cell"), nb::arg("dtype"), nb::arg("sizes"), nb::arg("batch_sizes"),
          nb::arg("models"), nb::arg("first"), nb::arg("strides"), nb::arg("threads"), nb::arg("recompute") = false,
          "Gradients of several layers likewise: dy, dh_n, dc_n, dcells, y, reserve, x to weights as forward, dx, dh_0, dc_0, "
          "dcut_h, dcut_c, grads.");
    m.def(
        "reserve_bytes",
        [](int cell, int dtype, const SizeList& size_list, bool recompute) {
            Sizes sizes = sizes_of(size_list, 0);
            sizes.recompute = recompute;
            return reserve_bytes(cell_of(cell), dtype_of(dtype), sizes);
        },
        nb::arg("cell"), nb::arg("dtype"), nb::arg("sizes"), nb::arg("recompute") = false,
        "Bytes that forward keeps for backward.");
    m.def(
        "traits",
        [](int cell) {
            const Traits& t = traits_of(cell_of(cell));
            return std::make_tuple(t.gates, t.grads, t.saved, t.recomputed, t.has_cell, t.projects, t.uses_output);
        },
        nb::arg("cell"),
        "Of a cell: gates, gradients of their products, values kept for backward and with recompute, whether it has c, may be "
        "projected, and reads its output in backward.");
    m.def("instruction_sets", &instruction_sets, "Instruction sets that this processor can run, best first.");
    m.def("isa", [] { return std::string(active_isa()); }, "The instruction set in use.");
    m.def(
        "set_isa", [](const std::string& name) { set_isa(name, "instruction set"); }, nb::arg("name"),
        "Uses another instruction set from now on, in every thread.");
    define_tensors(m);
    m.attr("forced_threads") = forced_threads();
    if (const char* forced = std::getenv("OSTINATO_ISA"); forced && *forced) set_isa(forced, "OSTINATO_ISA");
}

#include "tensors.h"

#include "plain.h"

namespace ostinato {

Torch g_torch;

namespace {

bool connect(nb::object exchange, nb::type_object tensor, nb::type_object parameter, nb::object empty_like) {
    const auto* table = static_cast<const DlExchange*>(PyCapsule_GetPointer(exchange.ptr(), "dlpack_exchange_api"));
    if (!table) throw nb::python_error();
    if (table->version.major != 1) return false;
    const auto name = [](const char* text) { return PyUnicode_InternFromString(text); };
    g_torch = {table,
               reinterpret_cast<PyTypeObject*>(tensor.release().ptr()),
               reinterpret_cast<PyTypeObject*>(parameter.release().ptr()),
               empty_like.release().ptr(),
               name("new_empty"),
               name("contiguous"),
               name("is_neg")};
    return true;
}

// Returns (output, h_n, c_n, reserve), with None for h_n of one step (it is the output), for c_n of a cell without c and for
// reserve without `keep`; or None if it declines.
nb::object layer_forward(int cell, bool is_step, std::array<int64_t, 4> expected, nb::handle arrays, bool has_biases, bool keep,
                         bool recompute, int threads) {
    Layer layer{static_cast<Cell>(cell), is_step, has_biases, arrays};
    if (!layer.read(expected)) return nb::none();
    layer.sizes.recompute = recompute;
    const Sizes& z = layer.sizes;
    const bool has_c = traits_of(layer.cell).has_c;
    const Fresh y = layer.new_output();
    const bool is_like_y = z.steps == 1 && z.directions == 1 && !z.batch_sizes;
    const Fresh h_n = is_step ? Fresh() : layer.new_state(layer.at(kH0), z.output(), is_like_y ? &y : nullptr);
    const Fresh* const twin = z.behind() != z.output() ? nullptr : is_step ? &y : &h_n;
    const Fresh c_n = has_c ? layer.new_state(layer.at(kC0), z.behind(), twin) : Fresh();
    const int64_t kept = keep ? reserve_bytes(layer.cell, layer.reader.dtype, z) : 0;
    const Fresh reserve = kept ? Fresh(layer.at(kInput), {kept / stored_bytes(layer.reader.dtype)}) : Fresh();

    Forward call{layer.arguments};
    call.y = y.data, call.h_n = h_n.data, call.c_n = c_n.data, call.reserve = reserve.data;
    {
        nb::gil_scoped_release release;
        run(layer.cell, layer.reader.dtype, call, threads);
    }
    return nb::make_tuple(y.tensor, h_n.tensor, c_n.tensor, reserve.tensor);
}

// Returns the gradients of `arrays`, None for one that is not wanted or has none; or None if it declines.
// output: None where the cell's backward does not read it. arrived: a tuple of the gradients of output, h_n (but for one step) and
// c_n (where the cell has c), each of which may be None.
nb::object layer_backward(int cell, bool is_step, std::array<int64_t, 4> expected, nb::handle arrays, bool has_biases,
                          nb::handle output, nb::handle reserve, nb::handle arrived, nb::handle wanted, bool recompute,
                          int threads) {
    Layer layer{static_cast<Cell>(cell), is_step, has_biases, arrays};
    if (!layer.read(expected)) return nb::none();
    layer.sizes.recompute = recompute;
    const Sizes& z = layer.sizes;
    Reader& reader = layer.reader;
    const int64_t kept = reserve_bytes(layer.cell, reader.dtype, z);
    Backward call{layer.arguments};
    call.y = layer.read_output(output);
    if (!call.y && (z.steps > 1 || traits_of(layer.cell).uses_output)) return nb::none();
    if (kept) call.reserve = reader.read_reserve(reserve, kept);
    const bool has_h = !is_step, has_c = traits_of(layer.cell).has_c;
    if (!is_tuple(arrived, 1 + has_h + has_c)) return nb::none();
    call.dy = layer.read_output(PyTuple_GetItem(arrived.ptr(), 0));
    if (has_h) call.dh_n = layer.state(PyTuple_GetItem(arrived.ptr(), 1), z.output());
    if (has_c) call.dc_n = layer.state(PyTuple_GetItem(arrived.ptr(), 1 + has_h), z.behind());
    const Py_ssize_t count = PyTuple_Size(arrays.ptr()), cuts = layer.cuts;
    if (!reader.accepts || !is_tuple(wanted, count)) return nb::none();

    const nb::object result = nb::steal(PyTuple_New(count));
    void* grads[kWeights + 2 * 5 + kCuts] = {};
    for (Py_ssize_t place = 0; place < count; place++) {
        const bool is_mask = place == kBatchSizes || place == cuts + kLengths || place == cuts + kResets;
        const bool asked = !is_mask && PyTuple_GetItem(wanted.ptr(), place) == Py_True && layer.has(place);
        Fresh grad = asked ? Fresh(layer.at(place)) : Fresh();
        PyTuple_SetItem(result.ptr(), place, grad.tensor.release().ptr());
        grads[place] = grad.data;
    }
    call.dx = grads[kInput], call.dh_0 = grads[kH0], call.dc_0 = grads[kC0];
    call.dreset_h = grads[cuts + kResetH], call.dreset_c = grads[cuts + kResetC];
    for (int64_t d = 0; d < z.directions; d++) {
        void** of_weights = grads + kWeights + d * layer.per_direction;
        Weights<void*>& dw = call.grads[d];
        dw.ih = of_weights[0], dw.hh = of_weights[1];
        if (has_biases) dw.bias_ih = of_weights[2], dw.bias_hh = of_weights[3];
        if (z.projection) dw.hr = of_weights[layer.per_direction - 1];
        if (z.cell.parameters) dw.per_unit = of_weights[layer.per_direction - 1];
    }
    {
        nb::gil_scoped_release release;
        run(layer.cell, reader.dtype, call, threads);
    }
    return result;
}

}  // namespace

void define_tensors(nb::module_& m) {
    m.def("connect", &connect, nb::arg("exchange"), nb::arg("tensor"), nb::arg("parameter"), nb::arg("empty_like"),
          "Opens the fast path for a type of tensors; false if its function table is of another major version.");
    m.def("tensors_forward", &layer_forward, nb::arg("cell"), nb::arg("is_step"), nb::arg("sizes"), nb::arg("arrays"),
          nb::arg("has_biases"), nb::arg("keep"), nb::arg("recompute"), nb::arg("threads"),
          "One layer, or one step of a cell, on plain tensors; None if it declines.");
    m.def("tensors_backward", &layer_backward, nb::arg("cell"), nb::arg("is_step"), nb::arg("sizes"), nb::arg("arrays"),
          nb::arg("has_biases"), nb::arg("output").none(), nb::arg("reserve").none(), nb::arg("arrived"), nb::arg("wanted"),
          nb::arg("recompute"), nb::arg("threads"), "Gradients on plain tensors; None if it declines.");
}

}  // namespace ostinato

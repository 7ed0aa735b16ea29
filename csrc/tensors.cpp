#include "tensors.h"

#include <nanobind/stl/array.h>

#include <array>
#include <cstdint>
#include <initializer_list>

#include "cpu/engine.h"

namespace nb = nanobind;

namespace ostinato {
namespace {

// ---- DLPack 1.x, the part that is used: dmlc.github.io/dlpack/latest/c_api.html ----

struct DlTensor {
    void* data;
    struct {
        int32_t type, id;
    } device;
    int32_t ndim;
    struct {
        uint8_t code, bits;
        uint16_t lanes;
    } dtype;
    int64_t *shape, *strides;
    uint64_t byte_offset;
};

struct DlExchange {
    struct {
        uint32_t major, minor;
    } version;
    void* previous;
    void *allocate, *export_owned, *import_owned;
    int (*view)(void* py_object, DlTensor* out);  // borrows: valid while the tensor lives and keeps its shape
    void* current_stream;
};

constexpr int32_t kDlCpu = 1;
constexpr uint8_t kDlInt = 0, kDlFloat = 2, kDlBFloat = 4;

// What `connect` was given; never released, like the module itself.
const DlExchange* g_exchange = nullptr;
PyTypeObject *g_tensor = nullptr, *g_parameter = nullptr;
PyObject *g_empty_like = nullptr, *g_new_empty = nullptr, *g_contiguous = nullptr, *g_is_neg = nullptr;

bool connect(nb::object exchange, nb::type_object tensor, nb::type_object parameter, nb::object empty_like) {
    const auto* table = static_cast<const DlExchange*>(PyCapsule_GetPointer(exchange.ptr(), "dlpack_exchange_api"));
    if (!table) throw nb::python_error();
    if (table->version.major != 1) return false;
    g_exchange = table;
    g_tensor = reinterpret_cast<PyTypeObject*>(tensor.release().ptr());
    g_parameter = reinterpret_cast<PyTypeObject*>(parameter.release().ptr());
    g_empty_like = empty_like.release().ptr();
    g_new_empty = PyUnicode_InternFromString("new_empty");
    g_contiguous = PyUnicode_InternFromString("contiguous");
    g_is_neg = PyUnicode_InternFromString("is_neg");
    return true;
}

// ---- a tensor, looked at ----

using Shape = std::initializer_list<int64_t>;

bool is_dense(const DlTensor& t) {
    if (!t.strides) return true;
    int64_t expected = 1;
    for (int32_t i = t.ndim - 1; i >= 0; i--) {
        if (t.shape[i] != 1 && t.strides[i] != expected) return false;
        expected *= t.shape[i];
    }
    return true;
}

// Reads the tensors of one call; `accepts` turns false at the first that is not plain, dense and of the first one's dtype.
class Reader {
public:
    bool accepts = g_exchange != nullptr;
    Dtype dtype = Dtype::kFloat32;

    // Memory of a strided float tensor on the CPU, dense copies included; null, and declined, for anything else.
    const void* read(nb::handle object, DlTensor& out, bool make_dense = false) {
        if (!accepts || !look(object.ptr(), out)) return decline();
        if (!is_dense(out)) {
            if (!make_dense || kept_ == kCopies) return decline();
            copies_[kept_] = nb::steal(PyObject_VectorcallMethod(g_contiguous, objects(object.ptr()), 1, nullptr));
            if (!copies_[kept_].is_valid()) throw nb::python_error();
            if (!look(copies_[kept_++].ptr(), out)) return decline();
        }
        return out.data;
    }

    // The same for a tensor of the given shape, or None.
    const void* read(nb::handle object, Shape shape, bool make_dense = false) {
        if (object.is_none() || !accepts) return nullptr;
        DlTensor t;
        const void* data = read(object, t, make_dense);
        return data && has_shape(t, shape) ? data : decline();
    }

    const void* require(nb::handle object, Shape shape) { return object.is_none() ? decline() : read(object, shape); }

    // Dense int64 [T].
    const int64_t* read_counts(nb::handle object, int64_t& count) {
        DlTensor t;
        if (Py_TYPE(object.ptr()) != g_tensor || !view(object.ptr(), t) || t.dtype.code != kDlInt || t.dtype.bits != 64 ||
            t.ndim != 1 || !is_dense(t)) {
            decline();
            return nullptr;
        }
        count = t.shape[0];
        return static_cast<const int64_t*>(t.data);
    }

    const void* decline() {
        accepts = false;
        return nullptr;
    }

private:
    // Vectorcall may write before its first argument.
    PyObject** objects(PyObject* self) {
        arguments_[1] = self;
        return arguments_ + 1;
    }

    bool look(PyObject* object, DlTensor& out) {
        if (Py_TYPE(object) != g_tensor && Py_TYPE(object) != g_parameter) return false;
        Dtype found;
        if (!view(object, out) || !dtype_of(out, found)) return false;
        if (first_) dtype = found, first_ = false;
        if (found != dtype) return false;
        // Lazy negation: the memory holds -x.
        const auto negative = nb::steal(PyObject_VectorcallMethod(g_is_neg, objects(object), 1, nullptr));
        if (!negative.is_valid()) throw nb::python_error();
        return negative.ptr() == Py_False;
    }

    static bool dtype_of(const DlTensor& t, Dtype& out) {
        const auto [code, bits, lanes] = t.dtype;
        if (code == kDlBFloat && bits == 16)
            out = Dtype::kBFloat16;
        else if (code == kDlFloat && (bits == 16 || bits == 32 || bits == 64))
            out = bits == 16 ? Dtype::kFloat16 : bits == 32 ? Dtype::kFloat32 : Dtype::kFloat64;
        else
            return false;
        return true;
    }

    static bool view(PyObject* object, DlTensor& out) {
        if (g_exchange->view(object, &out) != 0) {
            PyErr_Clear();  // no memory behind it (sparse, functional, batched): another backend knows what that is
            return false;
        }
        // Empty tensors have no address, and neither have lazy zeros.
        return out.device.type == kDlCpu && out.dtype.lanes == 1 && out.byte_offset == 0 && out.data;
    }

    static bool has_shape(const DlTensor& t, Shape shape) {
        if (t.ndim != static_cast<int32_t>(shape.size())) return false;
        int32_t i = 0;
        for (int64_t size : shape)
            if (t.shape[i++] != size) return false;
        return true;
    }

    static constexpr int kCopies = 8;
    bool first_ = true;
    int kept_ = 0;
    nb::object copies_[kCopies];
    PyObject* arguments_[2] = {};
};

// ---- tensors to be written ----

nb::object new_empty(nb::handle like, const int64_t* shape, int64_t dims) {
    const auto sizes = nb::steal(PyTuple_New(static_cast<Py_ssize_t>(dims)));
    for (int64_t i = 0; i < dims; i++) PyTuple_SetItem(sizes.ptr(), static_cast<Py_ssize_t>(i), PyLong_FromLongLong(shape[i]));
    PyObject* arguments[] = {nullptr, like.ptr(), sizes.ptr()};
    auto fresh = nb::steal(PyObject_VectorcallMethod(g_new_empty, arguments + 1, 2, nullptr));
    if (!fresh.is_valid()) throw nb::python_error();
    return fresh;
}

// Vectorcall, because the limited API of Python 3.12 has no PyObject_CallOneArg.
nb::object empty_like(nb::handle like) {
    PyObject* arguments[] = {nullptr, like.ptr()};
    auto fresh = nb::steal(PyObject_Vectorcall(g_empty_like, arguments + 1, 1 | PY_VECTORCALL_ARGUMENTS_OFFSET, nullptr));
    if (!fresh.is_valid()) throw nb::python_error();
    return fresh;
}

// A dense tensor of another's dtype, and its memory.
struct Fresh {
    nb::object tensor = nb::none();
    void* data = nullptr;

    Fresh() = default;
    Fresh(nb::handle like, Shape shape) : tensor(new_empty(like, shape.begin(), static_cast<int64_t>(shape.size()))) {
        DlTensor t;
        look(t);
    }
    // Shaped like it, too.
    explicit Fresh(nb::handle like) : tensor(empty_like(like)) {
        DlTensor t;
        look(t);
        if (is_dense(t)) return;  // empty_like takes half the time of new_empty, but keeps a transposition
        tensor = new_empty(like, t.shape, t.ndim);
        look(t);
    }

private:
    void look(DlTensor& t) {
        if (g_exchange->view(tensor.ptr(), &t) != 0) throw nb::python_error();
        data = t.data;
    }
};

// ---- a layer, or one step of a cell ----

// What both functions below take: input (T, B, I), or (N, I) with batch_sizes, and states (D, B, ...); with is_step, arrays
// without dimensions for steps and directions: (B, I) or (I,), and (B, ...) or (H,).
struct Layer {
    const Cell cell;
    const bool is_step, has_biases;
    const nb::handle input, batch_sizes, h_0, c_0;
    const nb::handle weights;  // a tuple, as in ostinato.ops.layer

    Reader reader{};
    DlTensor x{};
    Arguments arguments{};
    Sizes& sizes = arguments.sizes;
    int64_t per_direction = 0;

    // Reads and checks everything against the sizes of the module: (input_size, hidden_size, proj_size, directions).
    bool read(const std::array<int64_t, 4>& expected) {
        const auto [I, H, P, D] = expected;
        if (static_cast<int>(cell) < 0 || static_cast<int>(cell) >= kCells || (D != 1 && D != 2)) return false;
        if (P && !traits_of(cell).projects) return false;
        arguments.x = reader.read(input, x, true);
        if (!reader.accepts || x.ndim < 1 || x.ndim > 3 || x.shape[x.ndim - 1] != I || H < 1) return false;
        const int64_t columns = x.ndim > 1 ? x.shape[x.ndim - 2] : 1;
        if (is_step && x.ndim < 3)
            sizes = {1, columns, columns, I, H, P, D, nullptr};
        else if (!is_step && x.ndim == 3 && batch_sizes.is_none())
            sizes = {x.shape[0], x.shape[0] * columns, columns, I, H, P, D, nullptr};
        else if (is_step || x.ndim != 2 || batch_sizes.is_none() || !read_packed(columns, expected))
            return false;
        arguments.h_0 = state(h_0, sizes.output());
        arguments.c_0 = state(c_0, H);
        if (arguments.c_0 && !traits_of(cell).has_c) return false;
        const int64_t rows = gates_of(cell) * H, O = sizes.output();
        per_direction = 2 + 2 * has_biases + (P ? 1 : 0);
        if (!PyTuple_CheckExact(weights.ptr()) || PyTuple_Size(weights.ptr()) != D * per_direction) return false;
        for (int64_t d = 0; d < D; d++) {
            Weights<const void*>& w = arguments.weights[d];
            w.ih = reader.require(weight(d, 0), {rows, I});
            w.hh = reader.require(weight(d, 1), {rows, O});
            if (has_biases) w.bias_ih = reader.require(weight(d, 2), {rows}), w.bias_hh = reader.require(weight(d, 3), {rows});
            if (P) w.hr = reader.require(weight(d, per_direction - 1), {O, H});
        }
        return reader.accepts;
    }

    // The checks of ostinato.check.check_batch_sizes. Rows without a step are left to another backend.
    bool read_packed(int64_t rows, const std::array<int64_t, 4>& expected) {
        int64_t steps = 0, sum = 0;
        const int64_t* counts = reader.read_counts(batch_sizes, steps);
        if (!counts || steps == 0 || counts[0] < 1 || counts[0] > rows) return false;
        for (int64_t t = 0; t < steps; t++) {
            if (counts[t] < 0 || (t && counts[t] > counts[t - 1])) return false;
            sum += counts[t];
        }
        sizes = {steps, rows, counts[0], expected[0], expected[1], expected[2], expected[3], counts};
        return sum == rows;
    }

    // (T, B, D * O), (N, D * O), (B, H) or (H,)
    const void* read_output(nb::handle object) {
        const int64_t width = sizes.directions * sizes.output();
        if (is_step) return state(object, width);
        return sizes.batch_sizes ? reader.read(object, {sizes.rows, width}, true)
                                 : reader.read(object, {sizes.steps, sizes.batch, width}, true);
    }

    Fresh new_output() const {
        const int64_t width = sizes.directions * sizes.output();
        if (is_step) return new_state(h_0, width);
        return sizes.batch_sizes ? Fresh(input, {sizes.rows, width}) : Fresh(input, {sizes.steps, sizes.batch, width});
    }

    nb::handle weight(int64_t direction, int64_t index) const {
        return PyTuple_GetItem(weights.ptr(), direction * per_direction + index);
    }

    const void* state(nb::handle object, int64_t size) {
        if (!is_step) return reader.read(object, {sizes.directions, sizes.batch, size}, true);
        return x.ndim == 2 ? reader.read(object, {sizes.batch, size}, true) : reader.read(object, {size}, true);
    }

    Fresh new_state(nb::handle like, int64_t size) const {
        if (!like.is_none()) return Fresh(like);
        if (!is_step) return Fresh(input, {sizes.directions, sizes.batch, size});
        return x.ndim == 2 ? Fresh(input, {sizes.batch, size}) : Fresh(input, {size});
    }
};

// Returns (output, h_n, c_n, reserve), with None for h_n of one step (it is the output), for c_n of a cell without c and for
// reserve without `keep`; or None if it declines.
nb::object layer_forward(int cell, bool is_step, std::array<int64_t, 4> expected, nb::handle input, nb::handle batch_sizes,
                         nb::handle h_0, nb::handle c_0, nb::handle weights, bool has_biases, bool keep, bool recompute,
                         int threads) {
    Layer layer{static_cast<Cell>(cell), is_step, has_biases, input, batch_sizes, h_0, c_0, weights};
    if (!layer.read(expected)) return nb::none();
    layer.sizes.recompute = recompute;
    const Sizes& z = layer.sizes;
    const bool has_c = traits_of(layer.cell).has_c;
    const Fresh y = layer.new_output();
    const Fresh h_n = is_step ? Fresh() : layer.new_state(h_0, z.output());
    const Fresh c_n = has_c ? layer.new_state(c_0, z.hidden) : Fresh();
    const int64_t kept = keep ? reserve_bytes(layer.cell, layer.reader.dtype, z) : 0;
    const Fresh reserve = kept ? Fresh(input, {kept / stored_bytes(layer.reader.dtype)}) : Fresh();

    Forward call{layer.arguments};
    call.y = y.data, call.h_n = h_n.data, call.c_n = c_n.data, call.reserve = reserve.data;
    {
        nb::gil_scoped_release release;
        run(layer.cell, layer.reader.dtype, call, threads);
    }
    return nb::make_tuple(y.tensor, h_n.tensor, c_n.tensor, reserve.tensor);
}

// Returns the gradients of (input, h_0, c_0, *weights), None for one that is not wanted; or None if it declines.
// output: None where the cell's backward does not read it. grads: of output, h_n and c_n, each may be None.
nb::object layer_backward(int cell, bool is_step, std::array<int64_t, 4> expected, nb::handle input, nb::handle batch_sizes,
                          nb::handle h_0, nb::handle c_0, nb::handle weights, bool has_biases, nb::handle output,
                          nb::handle reserve, nb::handle dy, nb::handle dh_n, nb::handle dc_n, nb::handle wanted,
                          bool recompute, int threads) {
    Layer layer{static_cast<Cell>(cell), is_step, has_biases, input, batch_sizes, h_0, c_0, weights};
    if (!layer.read(expected)) return nb::none();
    layer.sizes.recompute = recompute;
    const Sizes& z = layer.sizes;
    Reader& reader = layer.reader;
    const int64_t kept = reserve_bytes(layer.cell, reader.dtype, z) / stored_bytes(reader.dtype);
    Backward call{layer.arguments};
    call.y = layer.read_output(output);
    if (!call.y && (z.steps > 1 || traits_of(layer.cell).uses_output)) return nb::none();
    if (kept) call.reserve = reader.require(reserve, {kept});
    call.dy = layer.read_output(dy);
    call.dh_n = layer.state(dh_n, z.output());
    call.dc_n = layer.state(dc_n, z.hidden);
    const auto count = static_cast<Py_ssize_t>(3 + z.directions * layer.per_direction);
    if (!reader.accepts || !PyTuple_CheckExact(wanted.ptr()) || PyTuple_Size(wanted.ptr()) != count) return nb::none();

    const nb::object result = nb::steal(PyTuple_New(count));
    const auto want = [&](Py_ssize_t index, nb::handle like) -> void* {
        const bool asked = PyTuple_GetItem(wanted.ptr(), index) == Py_True && !like.is_none();
        Fresh grad = asked ? Fresh(like) : Fresh();
        PyTuple_SetItem(result.ptr(), index, grad.tensor.release().ptr());
        return grad.data;
    };
    call.dx = want(0, input), call.dh_0 = want(1, h_0), call.dc_0 = want(2, c_0);
    for (int64_t d = 0; d < z.directions; d++) {
        const int64_t first = d * layer.per_direction;
        const auto grad = [&](int64_t i) { return want(static_cast<Py_ssize_t>(3 + first + i), layer.weight(d, i)); };
        Weights<void*>& dw = call.grads[d];
        dw.ih = grad(0), dw.hh = grad(1);
        if (has_biases) dw.bias_ih = grad(2), dw.bias_hh = grad(3);
        if (z.projection) dw.hr = grad(layer.per_direction - 1);
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
    m.def("tensors_forward", &layer_forward, nb::arg("cell"), nb::arg("is_step"), nb::arg("sizes"), nb::arg("input").none(),
          nb::arg("batch_sizes").none(), nb::arg("h_0").none(), nb::arg("c_0").none(), nb::arg("weights"),
          nb::arg("has_biases"), nb::arg("keep"), nb::arg("recompute"), nb::arg("threads"),
          "One layer, or one step of a cell, on plain tensors; None if it declines.");
    m.def("tensors_backward", &layer_backward, nb::arg("cell"), nb::arg("is_step"), nb::arg("sizes"), nb::arg("input").none(),
          nb::arg("batch_sizes").none(), nb::arg("h_0").none(), nb::arg("c_0").none(), nb::arg("weights"),
          nb::arg("has_biases"), nb::arg("output").none(), nb::arg("reserve").none(), nb::arg("dy").none(),
          nb::arg("dh_n").none(), nb::arg("dc_n").none(), nb::arg("wanted"), nb::arg("recompute"), nb::arg("threads"),
          "Gradients on plain tensors; None if it declines.");
}

}  // namespace ostinato

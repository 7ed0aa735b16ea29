// Torch's tensors, read without torch's headers: one by one, and those of a call.
//
// DLPack's table of C functions (torch.Tensor.__dlpack_c_exchange_api__, torch 2.10 and later) fills a plain struct from a
// tensor in some 40 ns. The table is a stable binary interface: one build serves every version of torch.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/stl/array.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <initializer_list>

#include "cpu/engine.h"

namespace ostinato {

namespace nb = nanobind;

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

constexpr int32_t kDlCpu = 1, kDlCuda = 2;
constexpr uint8_t kDlInt = 0, kDlFloat = 2, kDlBFloat = 4, kDlBool = 6;

// What torch gave (tensors.cpp, connect); never released, like the module itself.
struct Torch {
    const DlExchange* exchange = nullptr;
    PyTypeObject *tensor = nullptr, *parameter = nullptr;
    PyObject *empty_like = nullptr, *new_empty = nullptr, *contiguous = nullptr, *is_neg = nullptr;
};
extern Torch g_torch;

// ---- a tensor, looked at ----

using Shape = std::initializer_list<int64_t>;

inline bool is_dense(const DlTensor& t) {
    if (!t.strides) return true;
    int64_t expected = 1;
    for (int32_t i = t.ndim - 1; i >= 0; i--) {
        if (t.shape[i] != 1 && t.strides[i] != expected) return false;
        expected *= t.shape[i];
    }
    return true;
}

// Reads the tensors of one call; `accepts` turns false at the first that is not plain, dense, and of the first one's dtype and
// device.
class Reader {
public:
    Reader() = default;
    // For the GPU engine nothing is copied. Where it reads pairs of numbers, arrays are to lie for that.
    static Reader for_gpu(int32_t device_type, bool reads_pairs) { return Reader(device_type, reads_pairs); }

    const bool is_cpu = true;
    bool accepts = g_torch.exchange != nullptr;
    Dtype dtype = Dtype::kFloat32;
    int32_t device_id = 0;

    // Memory of a strided float tensor on the device, dense copies included; null, and declined, for anything else.
    const void* read(nb::handle object, DlTensor& out, bool may_copy = false) {
        if (!accepts || !look(object.ptr(), out)) return decline();
        if (is_dense(out)) return is_cpu || is_aligned(out) ? out.data : decline();
        return is_cpu && may_copy && make_dense(object, out) ? out.data : decline();
    }

    // The same, of any strides.
    const void* read_strided(nb::handle object, DlTensor& out) {
        return accepts && look(object.ptr(), out) ? out.data : decline();
    }

    // The same for a tensor of the given shape, or None.
    const void* read(nb::handle object, Shape shape, bool may_copy = false) {
        if (object.is_none() || !accepts) return nullptr;
        DlTensor t;
        const void* data = read(object, t, may_copy);
        return data && has_shape(t, shape) ? data : decline();
    }

    const void* require(nb::handle object, Shape shape) { return object.is_none() ? decline() : read(object, shape); }

    // The same for a tensor of other numbers than the call's: counts of steps on the CPU, flags beside the input.
    const void* read_counts(nb::handle object, DlTensor& out) { return read_mask(object, kDlInt, 64, kDlCpu, out); }
    const void* read_flags(nb::handle object, DlTensor& out) {
        const void* data = read_mask(object, kDlBool, 8, type_, out);
        return data && out.device.id == device_id ? data : decline();
    }

    // What forward kept, as values of the call or as bytes.
    const void* read_reserve(nb::handle object, int64_t bytes) {
        DlTensor t;
        const bool is_one = accepts && Py_TYPE(object.ptr()) == g_torch.tensor && view(object.ptr(), type_, t) && is_dense(t);
        const bool is_here = is_one && t.device.id == device_id && (is_cpu || is_aligned(t));
        return is_here && t.ndim == 1 && t.shape[0] * (t.dtype.bits / 8) == bytes ? t.data : decline();
    }

    const void* decline() {
        accepts = false;
        return nullptr;
    }

private:
    Reader(int32_t device_type, bool reads_pairs) : is_cpu(false), type_(device_type), reads_pairs_(reads_pairs) {}

    // Vectorcall may write before its first argument.
    PyObject** objects(PyObject* self) {
        arguments_[1] = self;
        return arguments_ + 1;
    }

    bool look(PyObject* object, DlTensor& out) {
        if (Py_TYPE(object) != g_torch.tensor && Py_TYPE(object) != g_torch.parameter) return false;
        Dtype found;
        if (!view(object, type_, out) || !dtype_of(out, found)) return false;
        if (first_) dtype = found, device_id = out.device.id, first_ = false;
        if (found != dtype || out.device.id != device_id) return false;
        // Lazy negation: the memory holds -x.
        const auto negative = nb::steal(PyObject_VectorcallMethod(g_torch.is_neg, objects(object), 1, nullptr));
        if (!negative.is_valid()) throw nb::python_error();
        return negative.ptr() == Py_False;
    }

    const void* read_mask(nb::handle object, uint8_t code, uint8_t bits, int32_t type, DlTensor& out) {
        const bool is_one = accepts && Py_TYPE(object.ptr()) == g_torch.tensor && view(object.ptr(), type, out) &&
                            out.dtype.code == code && out.dtype.bits == bits;
        // On a GPU nobody reads it from here.
        return is_one && (type != kDlCpu || is_dense(out) || make_dense(object, out)) ? out.data : decline();
    }

    // Puts a dense copy, which lives as long as this, in the place of a tensor on the CPU.
    bool make_dense(nb::handle object, DlTensor& out) {
        if (kept_ == kCopies) return false;
        copies_[kept_] = nb::steal(PyObject_VectorcallMethod(g_torch.contiguous, objects(object.ptr()), 1, nullptr));
        if (!copies_[kept_].is_valid()) throw nb::python_error();
        return view(copies_[kept_++].ptr(), kDlCpu, out);
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

    bool is_aligned(const DlTensor& t) const {
        return !reads_pairs_ || reinterpret_cast<uintptr_t>(t.data) % (t.dtype.bits / 4) == 0;
    }

    static bool view(PyObject* object, int32_t type, DlTensor& out) {
        if (g_torch.exchange->view(object, &out) != 0) {
            PyErr_Clear();  // no memory behind it (sparse, functional, batched): another backend knows what that is
            return false;
        }
        // Empty tensors have no address, and neither have lazy zeros.
        return out.device.type == type && out.dtype.lanes == 1 && out.byte_offset == 0 && out.data;
    }

    static bool has_shape(const DlTensor& t, Shape shape) {
        if (t.ndim != static_cast<int32_t>(shape.size())) return false;
        int32_t i = 0;
        for (int64_t size : shape)
            if (t.shape[i++] != size) return false;
        return true;
    }

    static constexpr int kCopies = 12;
    const int32_t type_ = kDlCpu;
    const bool reads_pairs_ = false;
    bool first_ = true;
    int kept_ = 0;
    nb::object copies_[kCopies];
    PyObject* arguments_[2] = {};
};

// ---- tensors to be written ----

inline nb::object new_empty(nb::handle like, const int64_t* shape, int64_t dims) {
    const auto sizes = nb::steal(PyTuple_New(static_cast<Py_ssize_t>(dims)));
    for (int64_t i = 0; i < dims; i++) PyTuple_SetItem(sizes.ptr(), static_cast<Py_ssize_t>(i), PyLong_FromLongLong(shape[i]));
    PyObject* arguments[] = {nullptr, like.ptr(), sizes.ptr()};
    auto fresh = nb::steal(PyObject_VectorcallMethod(g_torch.new_empty, arguments + 1, 2, nullptr));
    if (!fresh.is_valid()) throw nb::python_error();
    return fresh;
}

// Vectorcall, because the limited API of Python 3.12 has no PyObject_CallOneArg.
inline nb::object empty_like(nb::handle like) {
    PyObject* arguments[] = {nullptr, like.ptr()};
    auto fresh = nb::steal(PyObject_Vectorcall(g_torch.empty_like, arguments + 1, 1 | PY_VECTORCALL_ARGUMENTS_OFFSET, nullptr));
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
        if (g_torch.exchange->view(tensor.ptr(), &t) != 0) throw nb::python_error();
        data = t.data;
    }
};

// ---- a layer, or one step of a cell ----

inline bool is_tuple(nb::handle object, Py_ssize_t size) {
    return PyTuple_CheckExact(object.ptr()) && PyTuple_Size(object.ptr()) == size;
}

// Where each array of a call stands in the tuple that both functions below take (ostinato.cpu.to_tuple). The weights, as in
// ostinato.ops.layer, come last, or before what cuts rows, in the order of Cut. Input is (T, B, I), or (N, I) with batch_sizes, and
// states are (D, B, ...); with is_step, they have no dimensions for steps and directions: (B, I) or (I,), and (B, ...) or (H,).
enum Place : Py_ssize_t { kBatchSizes, kInput, kH0, kC0, kWeights };
enum Cut : Py_ssize_t { kLengths, kResets, kResetH, kResetC, kCuts };

struct Layer {
    const Cell cell;
    const bool is_step, has_biases;
    const nb::handle arrays;

    Reader reader{};
    DlTensor x{};
    Arguments arguments{};
    Sizes& sizes = arguments.sizes;
    int64_t per_direction = 0;
    Py_ssize_t cuts = 0;  // the place of the first

    nb::handle at(Py_ssize_t place) const { return PyTuple_GetItem(arrays.ptr(), place); }
    nb::handle weight(int64_t direction, int64_t index) const {
        return at(static_cast<Py_ssize_t>(kWeights + direction * per_direction + index));
    }
    bool has(Py_ssize_t place) const { return !at(place).is_none(); }

    // Reads and checks everything against the sizes of the module: (input_size, hidden_size, proj_size, directions).
    bool read(const std::array<int64_t, 4>& expected) {
        const auto [I, H, P, D] = expected;
        if (!is_cell(static_cast<int>(cell)) || (D != 1 && D != 2)) return false;
        const Traits& t = traits_of(cell);
        if (P && !t.projects) return false;
        arguments.program = program_of(cell);
        per_direction = 2 + 2 * has_biases + (P || t.parameters ? 1 : 0),
        cuts = static_cast<Py_ssize_t>(kWeights + D * per_direction);
        const bool is_cut = is_tuple(arrays, cuts + kCuts);
        if (!is_cut && !is_tuple(arrays, cuts)) return false;
        // The GPU engine's time loop reads no input.
        arguments.x = reader.is_cpu ? reader.read(at(kInput), x, true) : reader.read_strided(at(kInput), x);
        if (!reader.accepts || x.ndim < 1 || x.ndim > 3 || x.shape[x.ndim - 1] != I + t.drives * H || H < 1) return false;
        const int64_t columns = x.ndim > 1 ? x.shape[x.ndim - 2] : 1;
        if (is_step && x.ndim < 3)
            sizes = {1, columns, columns, I, H, P, D, nullptr, t};
        else if (!is_step && x.ndim == 3 && !has(kBatchSizes))
            sizes = {x.shape[0], x.shape[0] * columns, columns, I, H, P, D, nullptr, t};
        else if (is_step || x.ndim != 2 || !has(kBatchSizes) || !read_packed(columns, expected))
            return false;
        arguments.h_0 = state(at(kH0), sizes.output()), arguments.c_0 = state(at(kC0), sizes.behind());
        if (is_cut && !read_cuts()) return false;
        if ((arguments.c_0 || arguments.reset_c) && !t.has_c) return false;
        const int64_t of_input = t.input_gates * H, of_state = t.gates * H, O = sizes.output();
        for (int64_t d = 0; d < D; d++) {
            Weights<const void*>& w = arguments.weights[d];
            // An own cell may have no gates on one side, and a tensor without elements no address.
            if (of_input) w.ih = reader.require(weight(d, 0), {of_input, I});
            if (of_state) w.hh = reader.require(weight(d, 1), {of_state, O});
            if (has_biases && of_input) w.bias_ih = reader.require(weight(d, 2), {of_input});
            if (has_biases && of_state) w.bias_hh = reader.require(weight(d, 3), {of_state});
            if (P) w.hr = reader.require(weight(d, per_direction - 1), {O, H});
            if (t.parameters) w.per_unit = reader.require(weight(d, per_direction - 1), {t.parameters, H});
        }
        return reader.accepts;
    }

    // The checks of ostinato.check.check_batch_sizes. Rows without a step are left to another backend.
    bool read_packed(int64_t rows, const std::array<int64_t, 4>& expected) {
        DlTensor t;
        const auto* counts = static_cast<const int64_t*>(reader.read_counts(at(kBatchSizes), t));
        if (!counts || t.ndim != 1 || counts[0] < 1 || counts[0] > rows) return false;
        const int64_t steps = t.shape[0];
        int64_t sum = 0;
        for (int64_t i = 0; i < steps; i++) {
            if (counts[i] < 0 || (i && counts[i] > counts[i - 1])) return false;
            sum += counts[i];
        }
        sizes = {steps, rows, counts[0], expected[0], expected[1], expected[2], expected[3], counts, traits_of(cell)};
        return sum == rows;
    }

    // What cuts rows: lengths (B,) of a padded batch, resets (T, B) or (N,), and states that these alone bring.
    bool read_cuts() {
        if (is_step) return false;
        DlTensor t;
        if (has(cuts + kLengths)) {
            const auto* lengths = static_cast<const int64_t*>(reader.read_counts(at(cuts + kLengths), t));
            const auto is_wrong = [&](int64_t n) { return n < 0 || n > sizes.steps; };
            if (!lengths || sizes.batch_sizes || t.ndim != 1 || t.shape[0] != sizes.batch) return false;
            if (std::any_of(lengths, lengths + sizes.batch, is_wrong)) return false;
            arguments.lengths = lengths;
        }
        if (!has(cuts + kResets)) return !has(cuts + kResetH) && !has(cuts + kResetC);
        arguments.resets = static_cast<const uint8_t*>(reader.read_flags(at(cuts + kResets), t));
        if (!arguments.resets || t.ndim != x.ndim - 1 || !std::equal(t.shape, t.shape + t.ndim, x.shape)) return false;
        arguments.reset_h = state(at(cuts + kResetH), sizes.output());
        arguments.reset_c = state(at(cuts + kResetC), sizes.behind());
        return true;
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
        if (is_step) return new_state(at(kH0), width);
        return sizes.batch_sizes ? Fresh(at(kInput), {sizes.rows, width})
                                 : Fresh(at(kInput), {sizes.steps, sizes.batch, width});
    }

    const void* state(nb::handle object, int64_t size) {
        if (!is_step) return reader.read(object, {sizes.directions, sizes.batch, size}, true);
        return x.ndim == 2 ? reader.read(object, {sizes.batch, size}, true) : reader.read(object, {size}, true);
    }

    // `twin`: a fresh tensor of this shape, if there is one: to make another like it takes half the time.
    Fresh new_state(nb::handle like, int64_t size, const Fresh* twin = nullptr) const {
        if (!like.is_none()) return Fresh(like);
        if (twin) return Fresh(twin->tensor);
        if (!is_step) return Fresh(at(kInput), {sizes.directions, sizes.batch, size});
        return x.ndim == 2 ? Fresh(at(kInput), {sizes.batch, size}) : Fresh(at(kInput), {size});
    }
};

}  // namespace ostinato

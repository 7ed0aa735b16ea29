#include "stream.h"

#include <nanobind/stl/array.h>
#include <nanobind/stl/vector.h>

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include "cpu/streams.h"
#include "plain.h"

namespace ostinato {

namespace {

using Address = uintptr_t;

struct Free {
    void operator()(void* p) const { std::free(p); }
};
using Memory = std::unique_ptr<void, Free>;

Memory raw(int64_t bytes) { return Memory(allocate(bytes)); }

Memory zeros(int64_t bytes) {
    Memory memory = raw(bytes);
    std::memset(memory.get(), 0, static_cast<size_t>(bytes));
    return memory;
}

// What the fast path for NumPy needs of it.
struct NumPy {
    PyTypeObject* array;
    nb::object empty, dtype, threads;  // numpy.empty, the stream's dtype, and what says how many threads there are
};

// A dense array that somebody else owns, while this lives.
class Buffer {
public:
    ~Buffer() {
        if (is_open_) PyBuffer_Release(&view_);
    }
    // False where it is no plain array of numbers in this format.
    bool open(nb::handle object, char format) {
        if (PyObject_GetBuffer(object.ptr(), &view_, PyBUF_STRIDES | PyBUF_FORMAT) != 0) {
            PyErr_Clear();
            return false;
        }
        is_open_ = true;
        if (!view_.format || view_.format[0] != format || view_.format[1] || address() % static_cast<Address>(view_.itemsize))
            return false;
        Py_ssize_t expected = view_.itemsize;
        for (int i = view_.ndim - 1; i >= 0; expected *= view_.shape[i--])
            if (view_.shape[i] != 1 && view_.strides[i] != expected) return false;
        return true;
    }
    // The same for an array that NumPy has just made.
    bool open_fresh(nb::handle object) {
        is_open_ = PyObject_GetBuffer(object.ptr(), &view_, PyBUF_WRITABLE) == 0;
        if (!is_open_) PyErr_Clear();
        return is_open_;
    }
    int dims() const { return view_.ndim; }
    const Py_ssize_t* shape() const { return view_.shape; }
    void* data() const { return view_.buf; }

private:
    Address address() const { return reinterpret_cast<Address>(view_.buf); }

    Py_buffer view_;
    bool is_open_ = false;
};

class Stream {
public:
    // sizes: layers, batch, input, hidden, projection.
    // planes: rows of int8 that are multiplied with int8 weights, 1 or 2; 0 where the weights are of the stream's dtype.
    Stream(int cell, int dtype, int planes, const std::array<int64_t, 5>& sizes, bool is_batched, nb::type_object array,
           nb::object empty, nb::object numpy_dtype, nb::object threads)
        : dtype_(static_cast<Dtype>(dtype)),
          is_batched_(is_batched),
          numpy_{reinterpret_cast<PyTypeObject*>(array.ptr()), std::move(empty), std::move(numpy_dtype), std::move(threads)} {
        if (cell < 0 || cell >= kCells) throw std::invalid_argument("cell must be 0.." + std::to_string(kCells - 1));
        if (dtype < 0 || dtype >= kDtypes || !(kernel_ = stream_kernel(static_cast<Cell>(cell), dtype_, planes > 0)))
            throw std::invalid_argument("dtype must be one that streams have");
        if (planes < 0 || planes > 2 || (planes && dtype_ != Dtype::kFloat32))
            throw std::invalid_argument("planes must be 0, or 1 or 2 beside float32");
        const auto [layers, batch, input, hidden, projection] = sizes;
        if (layers < 1 || batch < 0 || input < 1 || hidden < 1 || projection < 0)
            throw std::invalid_argument("sizes must be positive, batch and projection not negative");
        z_ = {layers, batch, input, hidden, projection, kTraits[static_cast<Cell>(cell)], planes};
        if (projection && !z_.cell.projects) throw std::invalid_argument("this cell has no projection");
        h_ = zeros(layers * h_bytes());
        c_ = zeros(z_.cell.has_c ? layers * c_bytes() : 0);
        seen_.resize(static_cast<size_t>(batch));
    }

    // weights: addresses of weight_ih, weight_hh, bias_ih, bias_hh, weight_hr and of the three weights' scales, of each layer;
    // 0 where absent.
    void load(const std::vector<Address>& weights) {
        const Turn turn(*this);
        check_addresses(weights);
        for (int64_t k = 0; k < z_.layers; k++) check_whole(weights_at<const void*>(weights, k));
        const auto packed = std::make_shared<std::vector<Memory>>();
        for (int64_t k = 0; k < z_.layers; k++) {
            packed->push_back(zeros(kernel_->packed_bytes(z_, k)));
            kernel_->pack(z_, k, weights_at<const void*>(weights, k), packed->back().get());
        }
        packed_ = packed;
        layers_ = layers_over(*packed, h_.get(), c_.get(), z_.batch);
    }

    void save(const std::vector<Address>& weights) {
        const Turn turn(*this);
        check_addresses(weights);
        check_loaded();
        for (int64_t k = 0; k < z_.layers; k++)
            kernel_->unpack(z_, k, layers_[static_cast<size_t>(k)].packed, weights_at<void*>(weights, k));
    }

    // The output, or None if it declines.
    nb::object call(nb::handle x) { return run_object(x, nb::none(), false); }
    nb::object step(nb::handle x, nb::handle rows) { return run_object(x, rows, true); }

    // On addresses: x [steps, rows, I], y [steps, rows, O], ids [rows] or 0.
    void run_at(Address x, Address y, int64_t steps, int64_t rows, Address ids, int threads) {
        const Turn turn(*this);
        if (steps < 0 || rows < 0 || (!ids && rows != z_.batch)) throw std::invalid_argument("sizes must fit the stream");
        const auto call =
            prepare(reinterpret_cast<void*>(x), reinterpret_cast<void*>(y), steps, rows, reinterpret_cast<const int64_t*>(ids));
        run_prepared(call, threads);
    }

    // One call over states from outside; the stream's own states stay as they are. x is a tensor, hx None for zeros, h, or (h, c).
    // Declines with None. Several threads may be here at once.
    //
    // A step: x is (I,) or (n, I), h is (O,) or (n, O), and what comes back is h, or (h, c). Else x is (T, I) or (T, n, I), with
    // is_batch_first (n, T, I), h is (R, O) or (R, n, O), and what comes back is (y, h) or (y, (h, c)). R is L; or, of a stack of two
    // directions, whose layers and directions are streams of their own, L * D: this is the first, and rest are the others.
    //
    // It declines where the weights are no longer what was packed: held is the dict that has them, watched a tuple of name, tensor
    // and version (None where a tensor counts none) of each.
    nb::object call_from(nb::handle x, nb::handle hx, bool is_step, bool is_batch_first, nb::handle held, nb::handle watched,
                         nb::handle rest) {
        Reader reader;
        DlTensor in;
        if (!is_as_packed(held, watched)) return nb::none();
        const void* data = reader.read(x, in, true);
        if (!data || !packed_ || reader.dtype != dtype_ || wants_gradient(x)) return nb::none();
        const int64_t dims = in.ndim + is_step, others = PyTuple_Size(rest.ptr());
        if (dims < 2 || dims > 3 || in.shape[in.ndim - 1] != z_.input || (is_step && (z_.layers > 1 || others)))
            return nb::none();
        const bool is_one = dims == 2, is_turned = is_batch_first && !is_step && !is_one;
        const int64_t n = is_one ? 1 : in.shape[is_turned ? 0 : in.ndim - 2], steps = is_step ? 1 : in.shape[is_turned ? 1 : 0];
        const int64_t R = others ? others + 1 : z_.layers, width = (others ? 2 : 1) * z_.output();
        nb::handle h = hx, c = nb::none();
        if (z_.cell.has_c && !hx.is_none()) {
            if (!is_tuple(hx, 2)) return nb::none();
            h = PyTuple_GetItem(hx.ptr(), 0), c = PyTuple_GetItem(hx.ptr(), 1);
            if (h.is_none() || c.is_none()) return nb::none();
        }
        const auto read = [&](nb::handle state, int64_t size) -> const void* {
            if (state.is_none()) return nullptr;
            const void* found = is_step  ? is_one ? reader.read(state, {size}, true) : reader.read(state, {n, size}, true)
                                : is_one ? reader.read(state, {R, size}, true)
                                         : reader.read(state, {R, n, size}, true);
            return found && wants_gradient(state) ? reader.decline() : found;
        };
        Outside outside{steps, n, read(h, z_.output()), read(c, z_.hidden)};
        if (!reader.accepts) return nb::none();
        const auto fresh = [&](nb::handle like, int64_t size) -> Fresh {
            if (!like.is_none()) return Fresh(like);
            if (is_step) return is_one ? Fresh(x, {size}) : Fresh(x, {n, size});
            return is_one ? Fresh(x, {R, size}) : Fresh(x, {R, n, size});
        };
        const Fresh h_n = fresh(h, z_.output());
        Fresh y, c_n;
        if (!is_step) y = is_one ? Fresh(x, {steps, width}) : Fresh(x, {in.shape[0], in.shape[1], width});
        if (z_.cell.has_c) c_n = z_.projection || !h.is_none() ? fresh(c, z_.hidden) : Fresh(h_n.tensor);
        // The output of one step is its state.
        outside.h_n = is_step ? nullptr : h_n.data, outside.c_n = c_n.data;
        if (is_step)
            run_outside(outside, data, h_n.data, -1);
        else
            run_directions(outside, static_cast<const char*>(data), static_cast<char*>(y.data), is_turned && steps > 1 && n > 1,
                           rest);
        const nb::object last = z_.cell.has_c ? nb::object(nb::make_tuple(h_n.tensor, c_n.tensor)) : h_n.tensor;
        return is_step ? last : nb::object(nb::make_tuple(y.tensor, last));
    }

    // The same on addresses, all dense: x [T, n, I], y [T, n, O], h [L, n, O], c [L, n, H]. 0 for states of zeros.
    void run_from(Address x, Address y, int64_t steps, int64_t rows, const std::array<Address, 4>& states, int threads) {
        if (steps < 0 || rows < 0) throw std::invalid_argument("sizes must not be negative");
        const auto [h_0, c_0, h_n, c_n] = states;
        const auto at = [](Address address) { return reinterpret_cast<void*>(address); };
        run_outside({steps, rows, at(h_0), at(c_0), at(h_n), at(c_n)}, at(x), at(y), threads);
    }

    // Copies h [L, B, O] and c [L, B, H]; 0 for c where there is none.
    void read_state(Address h, Address c) { copy_state(h, c, false); }
    void write_state(Address h, Address c) { copy_state(h, c, true); }

    // Zeros for the rows ids [count], or for all where ids is 0.
    void reset(Address ids, int64_t count) {
        const Turn turn(*this);
        if (!ids) {
            std::memset(h_.get(), 0, static_cast<size_t>(z_.layers * h_bytes()));
            if (z_.cell.has_c) std::memset(c_.get(), 0, static_cast<size_t>(z_.layers * c_bytes()));
            return;
        }
        const auto* rows = reinterpret_cast<const int64_t*>(ids);
        check_ids(rows, count);
        for (int64_t k = 0; k < z_.layers; k++)
            for (int64_t i = 0; i < count; i++) {
                const int64_t row = k * z_.batch + rows[i];
                std::memset(static_cast<char*>(h_.get()) + row * h_row(), 0, static_cast<size_t>(h_row()));
                if (z_.cell.has_c) std::memset(static_cast<char*>(c_.get()) + row * c_row(), 0, static_cast<size_t>(c_row()));
            }
    }

    int64_t bytes() const {
        int64_t sum = z_.layers * (h_bytes() + (z_.cell.has_c ? c_bytes() : 0));
        for (int64_t k = 0; k < z_.layers; k++) sum += kernel_->packed_bytes(z_, k);
        return sum;
    }

private:
    // One thread at a time.
    class Turn {
    public:
        explicit Turn(Stream& stream) : busy_(stream.busy_) {
            if (busy_.exchange(true, std::memory_order_acquire))
                throw std::runtime_error(
                    "Stream: expected one thread at a time, but another thread is in a call of this stream");
        }
        ~Turn() { busy_.store(false, std::memory_order_release); }
        Turn(const Turn&) = delete;
        Turn& operator=(const Turn&) = delete;

    private:
        std::atomic<bool>& busy_;
    };

    // A call over states from outside: [L, n, O] and [L, n, H], null for zeros, or for what nobody asks for.
    struct Outside {
        int64_t steps, rows;
        const void *h_0 = nullptr, *c_0 = nullptr;
        void *h_n = nullptr, *c_n = nullptr;
    };

    // Rows of all steps somewhere, in bytes.
    template <class Byte>
    struct Rows {
        Byte* p;
        int64_t step, row;
        Rows reversed(int64_t steps) const { return {p + (steps - 1) * step, -step, row}; }
        Rows behind(int64_t bytes) const { return {p + bytes, step, row}; }
    };
    static void copy_steps(const Rows<char>& to, const Rows<const char>& from, int64_t steps, int64_t rows, int64_t bytes) {
        for (int64_t t = 0; t < steps; t++)
            for (int64_t b = 0; b < rows; b++)
                std::memcpy(to.p + t * to.step + b * to.row, from.p + t * from.step + b * from.row, static_cast<size_t>(bytes));
    }

    // A whole stack: x [T, n, I] and y [T, n, D*O], or [n, T, ...] where they are turned.
    void run_directions(const Outside& of, const char* x, char* y, bool is_turned, nb::handle rest) {
        const int64_t value = computed_bytes(dtype_), n = of.rows, T = of.steps, others = PyTuple_Size(rest.ptr());
        const int64_t O = z_.output() * value, width = others ? 2 * O : O;
        const auto plain = [&](auto* p, int64_t row) { return Rows<std::remove_pointer_t<decltype(p)>>{p, n * row, row}; };
        const auto outer = [&](auto* p, int64_t row) {
            return Rows<std::remove_pointer_t<decltype(p)>>{p, is_turned ? row : n * row, is_turned ? T * row : row};
        };
        if (!others && !is_turned) return run_outside(of, x, y, -1);
        Memory between = raw(others > 1 ? T * n * width : 0), next = raw(others > 1 ? T * n * width : 0);
        for (int64_t k = 0; k <= others; k++) {
            const bool is_first = k < 2, is_last = k + 1 >= others, is_reverse = k % 2;
            Stream& stream =
                k ? *nb::cast<Stream*>(nb::handle(PyTuple_GetItem(rest.ptr(), static_cast<Py_ssize_t>(k - 1)))) : *this;
            const int64_t row = stream.z_.input * value;
            Rows<const char> from = is_first ? outer(x, row) : plain(static_cast<const char*>(between.get()), row);
            Rows<char> to =
                (is_last ? outer(y, width) : plain(static_cast<char*>(next.get()), width)).behind(is_reverse ? O : 0);
            if (is_reverse) from = from.reversed(T), to = to.reversed(T);
            const auto at = [&](auto* p, int64_t bytes) { return p ? p + k * n * bytes : nullptr; };
            stream.run_pieces(
                {T, n, at(static_cast<const char*>(of.h_0), O), at(static_cast<const char*>(of.c_0), z_.hidden * value),
                 at(static_cast<char*>(of.h_n), O), at(static_cast<char*>(of.c_n), z_.hidden * value)},
                from, to);
            if (is_reverse) between.swap(next);
        }
    }

    // Rows that lie anywhere, copied to where a call reads them, and from where it writes them, as many steps at once as stay near.
    void run_pieces(Outside of, const Rows<const char>& from, const Rows<char>& to) {
        const int64_t value = computed_bytes(dtype_), n = of.rows, T = of.steps, I = z_.input * value, O = z_.output() * value;
        const int64_t most = std::max<int64_t>(1, std::min(T, kNear / std::max<int64_t>(1, n * (I + O))));
        const Memory in = raw(most * n * I), out = raw(most * n * O);
        char *x = static_cast<char*>(in.get()), *y = static_cast<char*>(out.get());
        for (int64_t t = 0; t == 0 || t < T; t += most) {
            of.steps = std::min(most, T - t);
            copy_steps({x, n * I, I}, {from.p + t * from.step, from.step, from.row}, of.steps, n, I);
            run_outside(of, x, y, -1);
            copy_steps({to.p + t * to.step, to.step, to.row}, {y, n * O, O}, of.steps, n, O);
            of.h_0 = of.h_n, of.c_0 = of.c_n;
        }
    }

    // threads: -1 for what the stream was told to ask.
    void run_outside(const Outside& of, const void* x, void* y, int threads) {
        check_loaded();
        // Whoever comes while this call has given the GIL up finds no room here, and weights that live as long as the call.
        const auto packed = packed_;
        const int64_t rows = z_.layers * of.rows, h_size = rows * h_row(), c_size = z_.cell.has_c ? rows * c_row() : 0;
        Room room = std::move(room_);
        room_ = {};
        if (room.bytes < h_size + c_size || !room.memory) room = {zeros(h_size + c_size), h_size + c_size};
        char* h = static_cast<char*>(room.memory.get());
        char* c = h + h_size;
        fill_rows(h, of.h_0, rows, z_.output() * computed_bytes(dtype_), h_row());
        if (z_.cell.has_c) fill_rows(c, of.c_0, rows, z_.hidden * computed_bytes(dtype_), c_row());
        const auto layers = layers_over(*packed, h, c, of.rows);
        StreamSizes sizes = z_;
        sizes.batch = of.rows;
        const StreamCall call{sizes, layers.data(), of.steps, of.rows, nullptr, x, y};
        run_prepared(call, threads < 0 ? threads_for(call) : threads);
        if (of.h_n) copy_rows(static_cast<char*>(of.h_n), h, rows, z_.output() * computed_bytes(dtype_), h_row(), false);
        if (of.c_n) copy_rows(static_cast<char*>(of.c_n), c, rows, z_.hidden * computed_bytes(dtype_), c_row(), false);
        if (room.bytes <= kKept) room_ = std::move(room);
    }

    // Puts dense rows, or zeros, where a step reads them.
    static void fill_rows(char* to, const void* dense, int64_t rows, int64_t bytes, int64_t stride) {
        if (!dense || bytes != stride) std::memset(to, 0, static_cast<size_t>(rows * stride));
        if (dense) copy_rows(static_cast<char*>(const_cast<void*>(dense)), to, rows, bytes, stride, true);
    }

    std::vector<StreamLayer> layers_over(const std::vector<Memory>& packed, void* h, void* c, int64_t rows) const {
        std::vector<StreamLayer> layers;
        for (int64_t k = 0; k < z_.layers; k++)
            layers.push_back({packed[static_cast<size_t>(k)].get(), static_cast<char*>(h) + k * rows * h_row(),
                              z_.cell.has_c ? static_cast<char*>(c) + k * rows * c_row() : nullptr});
        return layers;
    }

    static constexpr int64_t kArrays = 8;

    template <class Pointer>
    static StreamWeights<Pointer> weights_at(const std::vector<Address>& all, int64_t layer) {
        const auto at = [&](int64_t i) { return reinterpret_cast<Pointer>(all[static_cast<size_t>(layer * kArrays + i)]); };
        return {at(0), at(1), at(2), at(3), at(4), at(5), at(6), at(7)};
    }
    void check_addresses(const std::vector<Address>& weights) const {
        if (static_cast<int64_t>(weights.size()) != z_.layers * kArrays)
            throw std::invalid_argument("expected eight addresses for each layer");
    }
    void check_whole(const StreamWeights<const void*>& w) const {
        const bool has_scales = z_.planes == 0 || (w.ih_scale && w.hh_scale && (!z_.projection || w.hr_scale));
        if (!w.ih || !w.hh || (z_.projection && !w.hr) || !has_scales)
            throw std::invalid_argument("expected every weight, and with int8 every scale");
    }
    void check_loaded() const {
        if (layers_.empty()) throw std::runtime_error("Stream: expected weights to be loaded first");
    }

    int64_t h_row() const { return padded(z_.output()) * computed_bytes(dtype_); }
    int64_t c_row() const { return padded(z_.hidden) * computed_bytes(dtype_); }
    int64_t h_bytes() const { return z_.batch * h_row(); }
    int64_t c_bytes() const { return z_.batch * c_row(); }

    // A row may stand in a call once: `seen_` holds the number of the last call that a row was seen in.
    void check_ids(const int64_t* ids, int64_t count) {
        seen_now_++;
        for (int64_t i = 0; i < count; i++) {
            if (ids[i] < 0 || ids[i] >= z_.batch)
                throw std::invalid_argument("Stream: rows: expected numbers from 0 to " + std::to_string(z_.batch - 1) +
                                            ", got " + std::to_string(ids[i]));
            int64_t& seen = seen_[static_cast<size_t>(ids[i])];
            if (seen == seen_now_)
                throw std::invalid_argument("Stream: rows: expected each row once, got " + std::to_string(ids[i]) + " twice");
            seen = seen_now_;
        }
    }

    StreamCall prepare(const void* x, void* y, int64_t steps, int64_t rows, const int64_t* ids) {
        check_loaded();
        if (ids) check_ids(ids, rows);
        return {z_, layers_.data(), steps, rows, ids, x, y};
    }

    void run_prepared(const StreamCall& call, int threads) {
        if (call.steps == 0 || call.rows == 0) return;
        // Giving the GIL up and taking it again is worth it for others only where there is something to wait for.
        if (!is_long(call)) return run(*kernel_, call, threads);
        nb::gil_scoped_release release;
        run(*kernel_, call, threads);
    }
    static bool is_long(const StreamCall& call) { return work_of(call) >= kLong; }

    int threads_for(const StreamCall& call) const {
        return is_worth_a_team(call) ? static_cast<int>(nb::cast<int64_t>(numpy_.threads())) : 1;
    }

    // Steps and rows of an input of these sizes; false if it is not this stream's. One sequence has no dimension for rows.
    template <class Size>
    bool read_shape(const Size* shape, int64_t dims, bool is_step, int64_t ids, int64_t& steps, int64_t& rows) const {
        const int64_t least = 1 + is_batched_;
        if (dims < least || dims > least + !is_step || shape[dims - 1] != z_.input) return false;
        steps = dims > least ? shape[0] : 1;
        rows = is_batched_ ? shape[dims - 2] : 1;
        return rows == (ids < 0 ? z_.batch : ids);
    }

    nb::object run_object(nb::handle x, nb::handle rows, bool is_step) {
        Buffer ids;
        const bool has_ids = !rows.is_none();
        if (layers_.empty() || (has_ids && !is_batched_)) return nb::none();
        if (has_ids && (Py_TYPE(rows.ptr()) != numpy_.array || !ids.open(rows, 'l') || ids.dims() != 1)) return nb::none();
        const int64_t count = has_ids ? ids.shape()[0] : -1;
        const auto* id = has_ids ? static_cast<const int64_t*>(ids.data()) : nullptr;
        if (Py_TYPE(x.ptr()) == numpy_.array) {
            Buffer in, out;
            int64_t steps, n;
            const char format = dtype_ == Dtype::kFloat64 ? 'd' : 'f';
            if (!in.open(x, format) || !read_shape(in.shape(), in.dims(), is_step, count, steps, n)) return nb::none();
            const nb::object y = new_array(in);
            if (!out.open_fresh(y)) return nb::none();
            const Turn turn(*this);
            const StreamCall call = prepare(in.data(), out.data(), steps, n, id);
            run_prepared(call, threads_for(call));
            return y;
        }
        Reader reader;
        DlTensor in;
        int64_t steps, n;
        const void* data = reader.read(x, in);
        if (!data || reader.dtype != dtype_ || wants_gradient(x) || !read_shape(in.shape, in.ndim, is_step, count, steps, n))
            return nb::none();
        const Fresh y = new_tensor(x, in);
        const Turn turn(*this);
        const StreamCall call = prepare(data, y.data, steps, n, id);
        run_prepared(call, threads_for(call));
        return y.tensor;
    }

    bool is_as_packed(nb::handle held, nb::handle watched) const {
        const Py_ssize_t count = PyTuple_Size(watched.ptr());
        if (count < 0) throw nb::python_error();
        for (Py_ssize_t i = 0; i + 2 < count; i += 3) {
            PyObject* tensor = PyTuple_GetItem(watched.ptr(), i + 1);
            PyObject* version = PyTuple_GetItem(watched.ptr(), i + 2);
            if (PyDict_GetItem(held.ptr(), PyTuple_GetItem(watched.ptr(), i)) != tensor) return false;
            if (version == Py_None) continue;
            const auto found = nb::steal(PyObject_GetAttr(tensor, version_.ptr()));
            if (!found.is_valid()) throw nb::python_error();
            if (PyLong_AsLongLong(found.ptr()) != PyLong_AsLongLong(version)) return false;
        }
        return true;
    }

    // There is none through a stream, and the caller says so.
    bool wants_gradient(nb::handle x) const {
        const auto found = nb::steal(PyObject_GetAttr(x.ptr(), requires_grad_.ptr()));
        if (!found.is_valid()) throw nb::python_error();
        return found.ptr() != Py_False;
    }

    // empty_like takes half the time of new_empty, so one tensor of the last output's shape is kept for it.
    Fresh new_tensor(nb::handle x, const DlTensor& in) {
        std::array<int64_t, 3> shape{in.ndim > 1 ? in.shape[0] : -1, in.ndim > 2 ? in.shape[1] : -1, in.ndim};
        if (!pattern_.is_valid() || shape != pattern_shape_) {
            std::array<int64_t, 3> sizes{};
            std::copy(in.shape, in.shape + in.ndim, sizes.begin());
            sizes[static_cast<size_t>(in.ndim - 1)] = z_.output();
            pattern_ = new_empty(x, sizes.data(), in.ndim);
            pattern_shape_ = shape;
        }
        return Fresh(pattern_);
    }

    nb::object new_array(const Buffer& like) const {
        const auto shape = nb::steal(PyTuple_New(like.dims()));
        for (int i = 0; i < like.dims(); i++) {
            const int64_t size = i + 1 == like.dims() ? z_.output() : like.shape()[i];
            PyTuple_SetItem(shape.ptr(), i, PyLong_FromLongLong(size));
        }
        PyObject* arguments[] = {nullptr, shape.ptr(), numpy_.dtype.ptr()};
        auto fresh =
            nb::steal(PyObject_Vectorcall(numpy_.empty.ptr(), arguments + 1, 2 | PY_VECTORCALL_ARGUMENTS_OFFSET, nullptr));
        if (!fresh.is_valid()) throw nb::python_error();
        return fresh;
    }

    void copy_state(Address h, Address c, bool writes) {
        const Turn turn(*this);
        const int64_t rows = z_.layers * z_.batch;
        copy_rows(reinterpret_cast<char*>(h), h_.get(), rows, z_.output() * computed_bytes(dtype_), h_row(), writes);
        if (z_.cell.has_c)
            copy_rows(reinterpret_cast<char*>(c), c_.get(), rows, z_.hidden * computed_bytes(dtype_), c_row(), writes);
    }
    static void copy_rows(char* dense, void* own, int64_t rows, int64_t bytes, int64_t stride, bool writes) {
        char* row = static_cast<char*>(own);
        for (int64_t i = 0; i < rows; i++, row += stride, dense += bytes)
            if (writes)
                std::memcpy(row, dense, static_cast<size_t>(bytes));
            else
                std::memcpy(dense, row, static_cast<size_t>(bytes));
    }

    static constexpr int64_t kLong = 1 << 20;  // multiply-adds of some twenty microseconds
    static constexpr int64_t kNear = 1 << 20;  // bytes of rows that are copied at once: about a second-level cache
    static constexpr int64_t kKept = 1 << 20;  // bytes of states from outside that are kept for the next call

    // Where states from outside lie during a call.
    struct Room {
        Memory memory;
        int64_t bytes = 0;
    };

    const Dtype dtype_;
    const bool is_batched_;
    const NumPy numpy_;
    const StreamKernel* kernel_ = nullptr;
    StreamSizes z_{};
    Memory h_, c_;
    std::shared_ptr<const std::vector<Memory>> packed_;
    std::vector<StreamLayer> layers_;
    Room room_;
    std::vector<int64_t> seen_;
    int64_t seen_now_ = 0;
    const nb::object requires_grad_ = nb::steal(PyUnicode_InternFromString("requires_grad"));
    const nb::object version_ = nb::steal(PyUnicode_InternFromString("_version"));
    nb::object pattern_;
    std::array<int64_t, 3> pattern_shape_{};
    std::atomic<bool> busy_{false};
};

}  // namespace

void define_stream(nb::module_& m) {
    nb::class_<Stream>(m, "Stream", "Frozen layers and their states. Use ostinato.Stream instead.")
        .def(
            nb::init<int, int, int, const std::array<int64_t, 5>&, bool, nb::type_object, nb::object, nb::object, nb::object>(),
            nb::arg("cell"), nb::arg("dtype"), nb::arg("planes"), nb::arg("sizes"), nb::arg("is_batched"), nb::arg("array"),
            nb::arg("empty"), nb::arg("numpy_dtype"), nb::arg("threads"),
            "sizes: layers, batch, input, hidden, projection. array, empty: NumPy's. threads: says how many there are.")
        .def("load", &Stream::load, nb::arg("weights"),
             "Packs weights: addresses of weight_ih, weight_hh, bias_ih, bias_hh, weight_hr and scales of each layer, 0 for "
             "none.")
        .def("save", &Stream::save, nb::arg("weights"), "Writes the weights to such addresses.")
        .def("call", &Stream::call, nb::arg("x").none(), "One step or many of all rows; None if it declines.")
        .def("step", &Stream::step, nb::arg("x").none(), nb::arg("rows").none(), "One step of some rows; None if it declines.")
        .def("run", &Stream::run_at, nb::arg("x"), nb::arg("y"), nb::arg("steps"), nb::arg("rows"), nb::arg("ids"),
             nb::arg("threads"), "The same on addresses: x [steps, rows, I], y [steps, rows, O], ids [rows] or 0.")
        .def(
            "call_from", &Stream::call_from, nb::arg("x").none(), nb::arg("hx").none(), nb::arg("is_step"),
            nb::arg("is_batch_first"), nb::arg("held"), nb::arg("watched"), nb::arg("rest"),
            "A call over states from outside: (y, h_n) or (y, (h_n, c_n)), with is_step the states alone; None if it declines.")
        .def("run_from", &Stream::run_from, nb::arg("x"), nb::arg("y"), nb::arg("steps"), nb::arg("rows"), nb::arg("states"),
             nb::arg("threads"), "The same on addresses; states: h_0, c_0, h_n, c_n, 0 for none.")
        .def("read_state", &Stream::read_state, nb::arg("h"), nb::arg("c"), "Copies the states to h [L, B, O] and c [L, B, H].")
        .def("write_state", &Stream::write_state, nb::arg("h"), nb::arg("c"), "Copies them from there.")
        .def("reset", &Stream::reset, nb::arg("ids"), nb::arg("count"), "Zeros for these rows, or for all where ids is 0.")
        .def_prop_ro("bytes", &Stream::bytes, "Memory of weights and states.");
}

}  // namespace ostinato

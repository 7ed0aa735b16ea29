#include "gpu.h"

#include <stdexcept>
#include <string>

#include "plain.h"

namespace ostinato {
namespace {

// ---- the driver, by its stable binary interface: docs.nvidia.com/cuda/cuda-driver-api ----

struct alignas(8) LaunchAttribute {
    uint32_t id, padding;
    uint32_t value[16];
};
static_assert(sizeof(LaunchAttribute) == 72, "CUlaunchAttribute");
constexpr uint32_t kCooperative = 2, kClusterDimension = 4;

struct LaunchConfig {
    uint32_t grid[3], block[3], shared_bytes;
    void* stream;
    LaunchAttribute* attributes;
    uint32_t attribute_count;
};
static_assert(sizeof(LaunchConfig) == 56, "CUlaunchConfig");

struct Driver {
    int (*launch)(const LaunchConfig*, void* function, void** parameters, void** extra) = nullptr;
    int (*current)(void** context) = nullptr;
    int (*push)(void* context) = nullptr;
    int (*pop)(void** context) = nullptr;
};
Driver g_driver;

template <class Function>
void point(Function& function, uintptr_t address) {
    function = reinterpret_cast<Function>(address);
}

void connect_driver(uintptr_t launch, uintptr_t current, uintptr_t push, uintptr_t pop) {
    point(g_driver.launch, launch), point(g_driver.current, current), point(g_driver.push, push), point(g_driver.pop, pop);
}

void expect_success(const char* name, int error) {
    if (error) throw std::runtime_error(std::string(name) + ": expected CUDA_SUCCESS, got error " + std::to_string(error));
}

// Makes a context this thread's, which may have another one or none, for as long as this lives.
class InContext {
public:
    explicit InContext(void* context) {
        void* current = nullptr;
        expect_success("cuCtxGetCurrent", g_driver.current(&current));
        if (current != context) expect_success("cuCtxPushCurrent", g_driver.push(context)), is_pushed_ = true;
    }
    ~InContext() {
        void* context;
        if (is_pushed_) g_driver.pop(&context);
    }
    InContext(const InContext&) = delete;

private:
    bool is_pushed_ = false;
};

// A kernel that is loaded: how its blocks are launched.
class GpuKernel {
public:
    GpuKernel(uintptr_t function, uintptr_t context, int32_t device_type, int32_t device, uint32_t threads, uint32_t cluster,
              uint32_t shared_bytes, bool is_cooperative)
        : function_(reinterpret_cast<void*>(function)),
          context_(reinterpret_cast<void*>(context)),
          device_type_(device_type),
          device_(device),
          threads_(threads),
          cluster_(cluster),
          shared_bytes_(shared_bytes),
          is_cooperative_(is_cooperative) {}

    void launch(uint32_t blocks, uintptr_t stream, nb::handle arguments) const {
        if (!g_driver.launch) throw std::runtime_error("launch: no driver is connected");
        if (!PyTuple_CheckExact(arguments.ptr())) throw nb::type_error("arguments: expected a tuple");
        const Py_ssize_t count = PyTuple_Size(arguments.ptr());
        if (count > kMost) throw std::invalid_argument("arguments: too many");
        int64_t values[kMost];
        void* parameters[kMost];
        for (Py_ssize_t i = 0; i < count; i++)
            values[i] = value_of(PyTuple_GetItem(arguments.ptr(), i)), parameters[i] = values + i;
        LaunchAttribute attributes[2] = {};
        uint32_t used = 0;
        if (cluster_ > 1) attributes[used++] = {kClusterDimension, 0, {cluster_, 1, 1}};
        if (is_cooperative_) attributes[used++] = {kCooperative, 0, {1}};
        const LaunchConfig config{
            {blocks, 1, 1}, {threads_, 1, 1}, shared_bytes_, reinterpret_cast<void*>(stream), attributes, used};
        nb::gil_scoped_release release;  // a full queue makes the driver wait
        const InContext context(context_);
        expect_success("cuLaunchKernelEx", g_driver.launch(&config, function_, parameters, nullptr));
    }

private:
    // A number, where a dense tensor of the device lies, or 0 for None and for a tensor without elements.
    int64_t value_of(PyObject* object) const {
        if (object == Py_None) return 0;
        if (PyLong_Check(object)) {
            const int64_t value = PyLong_AsLongLong(object);
            if (value == -1 && PyErr_Occurred()) throw nb::python_error();
            return value;
        }
        DlTensor t;
        if (Py_TYPE(object) != g_torch.tensor && Py_TYPE(object) != g_torch.parameter)
            throw nb::type_error("arguments: expected numbers, plain tensors or None");
        if (g_torch.exchange->view(object, &t) != 0) throw nb::python_error();
        if (t.device.type != device_type_ || t.device.id != device_)
            throw std::invalid_argument("arguments: expected tensors on the kernel's device");
        for (int32_t i = 0; i < t.ndim; i++)
            if (!t.shape[i]) return 0;
        if (!is_dense(t)) throw std::invalid_argument("arguments: expected dense tensors");
        return reinterpret_cast<int64_t>(t.data) + static_cast<int64_t>(t.byte_offset);
    }

    static constexpr Py_ssize_t kMost = 40;
    void* const function_;
    void* const context_;
    const int32_t device_type_, device_;
    const uint32_t threads_, cluster_, shared_bytes_;
    const bool is_cooperative_;
};

// ---- whether a call's tensors are plain ----

// kept: None, or (output, reserve, arrived) of a backward call, where arrived is a tuple of the gradients of output, h_n and, where the
// cell has c, c_n, each of which may be None.
nb::object plain_sizes(int cell, std::array<int64_t, 4> expected, nb::handle arrays, bool has_biases, nb::handle kept,
                       int32_t device_type) {
    Layer layer{static_cast<Cell>(cell), false, has_biases, arrays, Reader::for_gpu(device_type, expected[1] % 2 == 0)};
    const auto& projection = expected[2];
    if (projection || !layer.read(expected) || layer.reader.dtype == Dtype::kFloat64) return nb::none();
    const Sizes& z = layer.sizes;
    if (z.steps > INT32_MAX || z.batch > INT32_MAX) return nb::none();  // kernels count in 32 bits
    if (!kept.is_none()) {
        if (!is_tuple(kept, 3)) return nb::none();
        const nb::handle arrived = PyTuple_GetItem(kept.ptr(), 2);
        const Traits& traits = traits_of(layer.cell);
        if (!is_tuple(arrived, 2 + traits.has_c) || !layer.read_output(PyTuple_GetItem(kept.ptr(), 0))) return nb::none();
        const int64_t bytes = z.rows * z.directions * traits.saved * z.hidden * stored_bytes(layer.reader.dtype);
        if (bytes) layer.reader.read_reserve(PyTuple_GetItem(kept.ptr(), 1), bytes);
        layer.read_output(PyTuple_GetItem(arrived.ptr(), 0));
        for (Py_ssize_t i = 1; i < 2 + traits.has_c; i++) layer.state(PyTuple_GetItem(arrived.ptr(), i), z.hidden);
    }
    if (!layer.reader.accepts) return nb::none();
    const bool is_ragged = z.batch_sizes || layer.arguments.lengths;
    return nb::make_tuple(layer.reader.device_id, z.steps, z.rows, z.batch, is_ragged);
}

}  // namespace

void define_gpu(nb::module_& m) {
    m.def("connect_driver", &connect_driver, nb::arg("launch"), nb::arg("current"), nb::arg("push"), nb::arg("pop"),
          "Takes the addresses of the driver's cuLaunchKernelEx, cuCtxGetCurrent, cuCtxPushCurrent and cuCtxPopCurrent.");
    nb::class_<GpuKernel>(m, "GpuKernel", "A kernel that is loaded on a device.")
        .def(nb::init<uintptr_t, uintptr_t, int32_t, int32_t, uint32_t, uint32_t, uint32_t, bool>(), nb::arg("function"),
             nb::arg("context"), nb::arg("device_type"), nb::arg("device"), nb::arg("threads"), nb::arg("cluster"),
             nb::arg("shared_bytes"), nb::arg("is_cooperative"),
             "function and context are the driver's handles, device_type and device DLPack's numbers.")
        .def("launch", &GpuKernel::launch, nb::arg("blocks"), nb::arg("stream"), nb::arg("arguments"),
             "Launches blocks on a stream of the device. Arguments are a tuple of numbers, dense tensors and None.");
    m.def("plain_sizes", &plain_sizes, nb::arg("cell"), nb::arg("sizes"), nb::arg("arrays"), nb::arg("has_biases"),
          nb::arg("kept").none(), nb::arg("device_type"),
          "Reads and checks the tensors of one layer on a GPU. Returns device, steps, rows, batch, and whether rows end early; "
          "or None if anything is not plain.");
}

}  // namespace ostinato

// One step of each cell, forward and backward, over a value type V: the only gate arithmetic in C++ and in CUDA.
// Equation numbers are those of docs/math.md.
//
// V is a lane vector on the CPU (cpu/vec.h, cpu/functions.h) or a scalar on the GPU (cuda/device.h). It brings +, -, *, /,
// mixed with plain numbers, and fma(a, b, c), sigmoid, tanh, sigmoid_times_tanh (one division), relu, where_positive; for cells
// of users' own also exp, log, sqrt, rsqrt, erf, softplus, abs, minimum, maximum, masks (lt, le, gt, ge, eq, ne, logical_and,
// logical_or, logical_not) and select(mask, a, b). No standard headers, so that NVRTC takes this file as it is.
//
// A time loop (cpu/sequence.h) drives a cell through the constants below and never names a gate:
//   kGates   rows of weight_hh per unit, in torch's order.
//   kJoint   gates [0, kJoint) receive input and hidden product in one sum; the others receive the hidden product
//            in a[g] and the input product apart in `x` (only n of the GRU: its hidden product is scaled by r).
//   kSaved   values per unit that forward keeps for backward; where nothing is kept, `saved` may be null.
//   kGrads   gate gradients per unit that backward returns; slot g < kGates is the gradient of the hidden product of
//            gate g, and input_slot(g) that of its input product.
//   kHasC    a second state c;  kProjects: h may be projected (weight_hr);  kUsesPrevious: h_{t-1} also enters beside
//            weight_hh, so backward reads it and returns a direct gradient;  kUsesOutput: backward reads h_t.
#pragma once

#ifdef __CUDACC__
#define OSTINATO_CELL __device__ __forceinline__
#else
#define OSTINATO_CELL inline __attribute__((always_inline))
#endif

namespace ostinato {

// What is asked of a cell where its type is not known: the constants above as a value. The records have the same. The last
// four are an own cell's alone (cpu/program.h); of the cells above they follow from the others.
struct Traits {
    int gates, grads, saved;
    int recomputed;  // how many of `saved` are kept where backward computes the gates again: the states behind h
    bool has_c, projects, uses_output, uses_previous;
    int input_gates;  // rows of weight_ih per unit
    int behind;  // states behind h, which lie in one array beside each other
    int parameters;  // numbers per unit
    int drives;  // numbers per unit and step, which the input brings behind its own
};

// Anonymous, because this header is compiled once per instruction set and no copy may replace another at link time.
namespace {

// Products with the slope of an activation, in terms of its output y; and c - a * b, rounded once.
template <class V>
OSTINATO_CELL V sigmoid_slope(V g, V y) {
    return g * (y * (V(1) - y));
}
template <class V>
OSTINATO_CELL V tanh_slope(V g, V y) {
    return g * fma(-y, y, V(1));
}
template <class V>
OSTINATO_CELL V relu_slope(V g, V y) {
    return where_positive(y, g);
}
template <class V>
OSTINATO_CELL V fnma(V a, V b, V c) {
    return fma(-a, b, c);
}

// Elman network, equation 2: h' = tanh(a) or relu(a).
template <bool kRelu>
struct Rnn {
    static constexpr int kGates = 1, kJoint = 1, kSaved = 0, kGrads = 1;
    static constexpr bool kHasC = false, kProjects = false, kUsesPrevious = false, kUsesOutput = true;
    static constexpr int input_slot(int gate) { return gate; }

    template <class V>
    OSTINATO_CELL static V forward(const V* a, V, V, V&, V*) {
        if constexpr (kRelu)
            return relu(a[0]);
        else
            return tanh(a[0]);
    }

    // Returns the part of dL/dh_{t-1} that does not pass through weight_hh.
    template <class V>
    OSTINATO_CELL static V backward(V dh, V&, const V*, V, V, V h, V* da) {
        if constexpr (kRelu)
            da[0] = relu_slope(dh, h);
        else
            da[0] = tanh_slope(dh, h);
        return V(0);
    }
};

// Gated recurrent unit, reset after the product: r, z, n.
struct Gru {
    static constexpr int kGates = 3, kJoint = 2, kSaved = 4, kGrads = 4;
    static constexpr bool kHasC = false, kProjects = false, kUsesPrevious = true, kUsesOutput = false;
    static constexpr int input_slot(int gate) { return gate == 2 ? 3 : gate; }

    template <class V>
    OSTINATO_CELL static V forward(const V* a, V x, V h, V&, V* saved) {
        const V r = sigmoid(a[0]);
        const V z = sigmoid(a[1]);
        const V q = a[2];
        const V n = tanh(fma(r, q, x));
        if (saved) saved[0] = r, saved[1] = z, saved[2] = n, saved[3] = q;
        return fma(z, h - n, n);
    }

    template <class V>
    OSTINATO_CELL static V backward(V dh, V&, const V* saved, V h_previous, V, V, V* da) {
        const V r = saved[0], z = saved[1], n = saved[2], q = saved[3];
        const V dn = tanh_slope(dh * (V(1) - z), n);
        da[0] = sigmoid_slope(dn * q, r);
        da[1] = sigmoid_slope(dh * (h_previous - n), z);
        da[2] = dn * r;
        da[3] = dn;
        return dh * z;
    }
};

// Long short-term memory: i, f, g, o. With a projection, h here is the state before it.
struct Lstm {
    static constexpr int kGates = 4, kJoint = 4, kSaved = 5, kGrads = 4;
    static constexpr bool kHasC = true, kProjects = true, kUsesPrevious = false, kUsesOutput = false;
    static constexpr int input_slot(int gate) { return gate; }

    template <class V>
    OSTINATO_CELL static V forward(const V* a, V, V, V& c, V* saved) {
        const V f = sigmoid(a[1]);
        c = fma(f, c, sigmoid_times_tanh(a[0], a[2]));
        if (saved) { saved[0] = sigmoid(a[0]), saved[1] = f, saved[2] = tanh(a[2]), saved[3] = sigmoid(a[3]), saved[4] = c; }
        return sigmoid_times_tanh(a[3], c);
    }

    // dc enters as dL/dc_t from step t+1 and leaves as dL/dc_{t-1}.
    template <class V>
    OSTINATO_CELL static V backward(V dh, V& dc, const V* saved, V, V c_previous, V, V* da) {
        const V i = saved[0], f = saved[1], g = saved[2], o = saved[3];
        const V tc = tanh(saved[4]);
        dc = fma(dh * o, fma(-tc, tc, V(1)), dc);
        da[0] = sigmoid_slope(dc * g, i);
        da[1] = sigmoid_slope(dc * c_previous, f);
        da[2] = tanh_slope(dc * i, g);
        da[3] = sigmoid_slope(dh * tc, o);
        dc = dc * f;
        return V(0);
    }

    // The state before the projection, from what forward saved.
    template <class V>
    OSTINATO_CELL static V output(const V* saved) {
        return saved[3] * tanh(saved[4]);
    }
};

template <class... C>
struct List {
    static constexpr int kSize = sizeof...(C);
};

// Every cell: its place here is its number. ostinato/cells.py has a record of each.
using EveryCell = List<Rnn<false>, Rnn<true>, Gru, Lstm>;

// Whether a joint gate's input product has the slot of its hidden one, and the gate apart the slot behind all of these.
template <class C>
constexpr bool slots_fit() {
    for (int gate = 0; gate < C::kGates; gate++)
        if (C::input_slot(gate) != (gate < C::kJoint ? gate : C::kGates)) return false;
    return true;
}

// What the time loops rely on, checked where a cell is listed.
template <class C>
constexpr Traits traits() {
    static_assert(C::kJoint == C::kGates || C::kJoint == C::kGates - 1, "at most one gate, the last, takes its products apart");
    static_assert(C::kGrads == 2 * C::kGates - C::kJoint, "a gate apart has a gradient for each of its two products");
    static_assert(slots_fit<C>(), "input_slot does not fit kJoint");
    static_assert(!C::kHasC || C::kSaved > 0, "c is the last value that is saved, and all that recompute keeps");
    static_assert(C::kUsesOutput || C::kSaved > 0, "backward has nothing to start from");
    constexpr int kBehind = C::kHasC ? 1 : 0;
    return {C::kGates,      C::kGrads,        C::kSaved, kBehind, C::kHasC, C::kProjects,
            C::kUsesOutput, C::kUsesPrevious, C::kGates, kBehind, 0,        0};
}

// ---- the wider contract: what the time loops of csrc/cuda ask of a cell ----
//
// The structs above say less than a cell may be: as many gates of the input as of the state, all but the last joint, one state
// behind h, no numbers of its own. A struct without kJoint says all of this itself (src/ostinato/own/cuda.py writes one for each
// own cell), and Wide derives it for the others.
//
//   kInputGates, kGates  rows of weight_ih and of weight_hh per unit. kGates may be 0: there is no hidden product then.
//   is_joint(gate)   whether the two products of a gate are in one sum, a[gate]. The hidden product of any other gate is alone in
//                    a[gate]; of all input products that are not in a sum, the i-th is x[i].
//   kBehind          states behind h, which is state 0.
//   kParameters, kDrives  numbers per unit, and per unit and step.
//   kSaved           values per unit that forward keeps; the last kBehind of them are the new states behind h.
//   kSlots           gradients per unit: of the hidden products, of the input products x[i], of the parameters.
//   kUsesOutput, reads_state(k), reads_saved(i)  what backward reads: h after the step, states before it, values kept.
//   kIsFinite        whether nothing becomes infinite or NaN where all that is read is zero, as in units that pad a layer.
//
// forward gets a, x, states, parameters and drives, and leaves the new states and `saved`. backward gets the gradients of the
// new states; it leaves the slots, what goes to each state before beside weight_hh, and the drives' gradients.
template <class...>
using Void = void;

template <class C, class = void>
struct Wide : C {};

template <class C>
struct Wide<C, Void<decltype(C::kJoint)>> {
    static constexpr int kInputGates = C::kGates, kGates = C::kGates, kBehind = C::kHasC ? 1 : 0, kParameters = 0, kDrives = 0;
    static constexpr int kSaved = C::kSaved, kSlots = C::kGrads;
    static constexpr bool kUsesOutput = C::kUsesOutput, kIsFinite = true;
    static constexpr bool is_joint(int gate) { return gate < C::kJoint; }
    static constexpr bool reads_state(int k) { return k ? C::kHasC : C::kUsesPrevious; }
    static constexpr bool reads_saved(int) { return true; }

    template <class V>
    OSTINATO_CELL static void forward(const V* a, const V* x, const V* states, const V*, const V*, V* next, V* saved) {
        V c = states[kBehind];
        next[0] = C::forward(a, x[0], states[0], c, saved);
        if constexpr (C::kHasC) next[1] = c;
    }

    template <class V>
    OSTINATO_CELL static void backward(const V* grads, const V* saved, const V* states, V h, const V*, const V*, V* slots,
                                       V* to_states, V*) {
        V dc = grads[kBehind];
        to_states[0] = C::backward(grads[0], dc, saved, states[0], states[kBehind], h, slots);
        if constexpr (C::kHasC) to_states[1] = dc;
    }
};

// Gates whose products stay apart, as bits.
template <class Cell>
constexpr unsigned apart(int gates) {
    unsigned bits = 0;
    for (int gate = 0; gate < gates; gate++) bits |= Cell::is_joint(gate) ? 0u : 1u << gate;
    return bits;
}
template <class Cell>
constexpr unsigned kInputsApart = apart<Cell>(Cell::kInputGates);
template <class Cell>
constexpr unsigned kHiddenAlone = apart<Cell>(Cell::kGates);

// How many of these are below `end`. Without a loop, so that a compiler which unrolls one around it has a number at once.
constexpr int count_below(unsigned bits, int end) {
    bits &= (1u << end) - 1u;
    bits -= bits >> 1 & 0x55555555u;
    bits = (bits & 0x33333333u) + (bits >> 2 & 0x33333333u);
    return static_cast<int>(((bits + (bits >> 4)) & 0x0f0f0f0fu) * 0x01010101u >> 24);
}

}  // namespace
}  // namespace ostinato

// What the GPU engine asks of the device, each thing by one name. These are built-in variables, barriers, remote stores, matrix products on
// tensor cores, conversions, loads and stores of global memory, and the value type of the cells. emulation.h has the same names on
// host fibers, so that one source runs under NVRTC and, in tests, without a GPU.
//
// No standard headers: NVRTC's wheel brings none. Instructions of Hopper alone are templates or unused on sm_80.
#pragma once

namespace ostinato {
namespace {

using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;
using i64 = long long;

// Storage types. A float that stands for a TF32 operand keeps its type.
struct BFloat16 {
    u16 bits;
};
struct Float16 {
    u16 bits;
};
struct Pair {
    float a, b;
};

}  // namespace
}  // namespace ostinato

#ifdef __CUDACC__
#define OSTINATO_DEVICE __device__ __forceinline__
#define OSTINATO_KERNEL extern "C" __global__ void
#define OSTINATO_BOUNDS(threads) __launch_bounds__(threads, 1)
#define OSTINATO_UNROLL _Pragma("unroll")
#define OSTINATO_ROLLED _Pragma("unroll 1")
#else
#include "emulation.h"
#endif

#ifdef __CUDACC__
namespace ostinato {
namespace {

OSTINATO_DEVICE int thread_index() { return threadIdx.x; }
OSTINATO_DEVICE int block_index() { return blockIdx.x; }

template <class Shared>
OSTINATO_DEVICE Shared& shared_memory() {
    extern __shared__ __align__(16) char memory[];
    return *reinterpret_cast<Shared*>(memory);
}

// ---- barriers ----

// Orders the shared memory of a block among its threads.
OSTINATO_DEVICE void block_barrier() { __syncthreads(); }

// Orders the shared memory of a cluster among its threads.
OSTINATO_DEVICE void cluster_barrier() {
    asm volatile("barrier.cluster.arrive.aligned;\n\tbarrier.cluster.wait.aligned;" ::: "memory");
}

OSTINATO_DEVICE u32 shared_address(const void* p) { return static_cast<u32>(__cvta_generic_to_shared(p)); }

// A barrier of shared memory that completes a phase after one arrival and as many bytes as that arrival expects.
OSTINATO_DEVICE void transaction_init(u64* barrier) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(barrier)) : "memory");
}

// Makes the barriers that this thread initialised known to the cluster; cluster_barrier() must follow.
OSTINATO_DEVICE void transaction_publish() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

OSTINATO_DEVICE void transaction_expect(u64* barrier, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
                 : "memory");
}

// Waits for the phase of this parity. What was pushed with it is then visible.
OSTINATO_DEVICE void transaction_wait(u64* barrier, u32 parity) {
    asm volatile(
        "{\n\t.reg .pred done;\n"
        "again:\n\tmbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], %1;\n\t"
        "@!done bra again;\n\t}" ::"r"(shared_address(barrier)),
        "r"(parity)
        : "memory");
}

OSTINATO_DEVICE u32 remote_address(const void* own, u32 rank) {
    u32 address;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(shared_address(own)), "r"(rank));
    return address;
}

// Stores a value at the place that `own` has in block `rank` of the cluster, and counts its bytes at that block's barrier. Who waits
// there finds the value; what this thread did before, it orders for nobody.
OSTINATO_DEVICE void push(void* own, u32 value, u64* barrier, u32 rank) {
    asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %1, [%2];" ::"r"(remote_address(own, rank)),
                 "r"(value), "r"(remote_address(barrier, rank))
                 : "memory");
}
OSTINATO_DEVICE void push(void* own, u64 value, u64* barrier, u32 rank) {
    asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.b64 [%0], %1, [%2];" ::"r"(remote_address(own, rank)),
                 "l"(value), "r"(remote_address(barrier, rank))
                 : "memory");
}

// Orders nothing but the compiler: what stands before it is not moved behind it, nor the other way round.
OSTINATO_DEVICE void schedule_barrier() { asm volatile("bar.warp.sync 0xffffffff;" ::: "memory"); }

OSTINATO_DEVICE float shuffle_xor(float value, int mask) { return __shfl_xor_sync(0xffffffffu, value, mask); }

// ---- matrix products: d (16 x 8) += a (16 x k) b (k x 8), fragments as PTX lays them out over a warp ----

OSTINATO_DEVICE void multiply(BFloat16, float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
OSTINATO_DEVICE void multiply(Float16, float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
// k = 8, TF32 in the words of floats.
OSTINATO_DEVICE void multiply(float, float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// ---- conversions, to nearest ----

OSTINATO_DEVICE u32 bits_of(float value) { return __float_as_uint(value); }
OSTINATO_DEVICE float float_of(u32 bits) { return __uint_as_float(bits); }

OSTINATO_DEVICE float widen(BFloat16 value) { return float_of(static_cast<u32>(value.bits) << 16); }
OSTINATO_DEVICE float widen(Float16 value) {
    float wide;
    asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(value.bits));
    return wide;
}
OSTINATO_DEVICE float widen(float value) { return value; }

OSTINATO_DEVICE void narrow(float value, BFloat16& to) { asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(to.bits) : "f"(value)); }
OSTINATO_DEVICE void narrow(float value, Float16& to) { asm("cvt.rn.f16.f32 %0, %1;" : "=h"(to.bits) : "f"(value)); }
OSTINATO_DEVICE void narrow(float value, float& to) { to = value; }

OSTINATO_DEVICE float to_tf32(float value) {
    u32 bits;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(value));
    return float_of(bits);
}

// The same number, of which the compiler knows nothing: what is computed from it is computed where it stands, not carried along
// with every step of a loop.
OSTINATO_DEVICE int opaque(int i) {
    asm volatile("" : "+r"(i));
    return i;
}

// A whole product of two numbers of 32 bits, one instruction, which adds what it is added to as well.
OSTINATO_DEVICE i64 multiply_wide(int a, int b) {
    i64 product;
    asm("mul.wide.s32 %0, %1, %2;" : "=l"(product) : "r"(a), "r"(b));
    return product;
}

// ---- global memory. Loads stay where they are written, so that they are under way while a barrier is awaited ----

OSTINATO_DEVICE u8 load(const u8* p) {
    u32 value;
    asm volatile("ld.global.nc.u8 %0, [%1];" : "=r"(value) : "l"(p));
    return static_cast<u8>(value);
}
OSTINATO_DEVICE u16 load(const u16* p) {
    u16 value;
    asm volatile("ld.global.nc.u16 %0, [%1];" : "=h"(value) : "l"(p));
    return value;
}
OSTINATO_DEVICE u32 load(const u32* p) {
    u32 value;
    asm volatile("ld.global.nc.u32 %0, [%1];" : "=r"(value) : "l"(p));
    return value;
}
OSTINATO_DEVICE u64 load(const u64* p) {
    u64 value;
    asm volatile("ld.global.nc.u64 %0, [%1];" : "=l"(value) : "l"(p));
    return value;
}
OSTINATO_DEVICE void prefetch(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }

// Words that other blocks write and read while the kernel runs: past the first cache level, each word whole, in no order.
OSTINATO_DEVICE void load_shared_words(const u32* p, u32 (&words)[4]) {
    asm volatile("ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                 : "l"(p)
                 : "memory");
}
OSTINATO_DEVICE void load_shared_words(const u64* p, u64 (&words)[2]) {
    asm volatile("ld.relaxed.gpu.global.v2.u64 {%0, %1}, [%2];" : "=l"(words[0]), "=l"(words[1]) : "l"(p) : "memory");
}
OSTINATO_DEVICE void store_shared_words(u32* p, u32 a, u32 b) {
    asm volatile("st.relaxed.gpu.global.v2.u32 [%0], {%1, %2};" ::"l"(p), "r"(a), "r"(b) : "memory");
}
OSTINATO_DEVICE void store_shared_words(u64* p, u64 a, u64 b) {
    asm volatile("st.relaxed.gpu.global.v2.u64 [%0], {%1, %2};" ::"l"(p), "l"(a), "l"(b) : "memory");
}

OSTINATO_DEVICE float reciprocal(float x) { return __frcp_rn(x); }
OSTINATO_DEVICE float fast_hyperbolic_tangent(float x) {
    float y;
    asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
OSTINATO_DEVICE float fused(float a, float b, float c) { return fmaf(a, b, c); }
OSTINATO_DEVICE float quotient(float a, float b) { return __fdiv_rn(a, b); }
OSTINATO_DEVICE float square_root(float x) { return __fsqrt_rn(x); }
OSTINATO_DEVICE float reciprocal_square_root(float x) { return rsqrtf(x); }

}  // namespace
}  // namespace ostinato
#endif

// ---- the value type of cells.h ----

namespace ostinato {
namespace {

// A float whose activations are as exact as float32 or, where all that is kept of them is a bfloat16, 11 bits good.
template <bool kIsFast>
struct Real {
    float value;
    Real() = default;
    OSTINATO_DEVICE Real(float v) : value(v) {}
};

template <bool kF>
OSTINATO_DEVICE Real<kF> operator+(Real<kF> a, Real<kF> b) {
    return a.value + b.value;
}
template <bool kF>
OSTINATO_DEVICE Real<kF> operator-(Real<kF> a, Real<kF> b) {
    return a.value - b.value;
}
template <bool kF>
OSTINATO_DEVICE Real<kF> operator-(Real<kF> a) {
    return -a.value;
}
template <bool kF>
OSTINATO_DEVICE Real<kF> operator*(Real<kF> a, Real<kF> b) {
    return a.value * b.value;
}
template <bool kF>
OSTINATO_DEVICE Real<kF> fma(Real<kF> a, Real<kF> b, Real<kF> c) {
    return fused(a.value, b.value, c.value);
}
template <bool kF>
OSTINATO_DEVICE Real<kF> tanh(Real<kF> a) {
    return kF ? fast_hyperbolic_tangent(a.value) : tanhf(a.value);
}
template <bool kF>
OSTINATO_DEVICE Real<kF> sigmoid(Real<kF> a) {
    return kF ? fused(0.5f, fast_hyperbolic_tangent(0.5f * a.value), 0.5f) : reciprocal(1.0f + expf(-a.value));
}
template <bool kF>
OSTINATO_DEVICE Real<kF> sigmoid_times_tanh(Real<kF> a, Real<kF> b) {
    return sigmoid(a) * tanh(b);
}
// NaN stays NaN, as in torch.
template <bool kF>
OSTINATO_DEVICE Real<kF> relu(Real<kF> a) {
    return a.value < 0.0f ? 0.0f : a.value;
}
// b where a is positive or NaN.
template <bool kF>
OSTINATO_DEVICE Real<kF> where_positive(Real<kF> a, Real<kF> b) {
    return a.value <= 0.0f ? 0.0f : b.value;
}

// What cells of users' own ask for besides. There is no fast form of it.
template <bool kF>
OSTINATO_DEVICE Real<kF> operator/(Real<kF> a, Real<kF> b) {
    return quotient(a.value, b.value);
}
template <bool kF>
OSTINATO_DEVICE Real<kF> exp(Real<kF> a) {
    return expf(a.value);
}
template <bool kF>
OSTINATO_DEVICE Real<kF> log(Real<kF> a) {
    return logf(a.value);
}
template <bool kF>
OSTINATO_DEVICE Real<kF> sqrt(Real<kF> a) {
    return square_root(a.value);
}
template <bool kF>
OSTINATO_DEVICE Real<kF> rsqrt(Real<kF> a) {
    return reciprocal_square_root(a.value);
}
template <bool kF>
OSTINATO_DEVICE Real<kF> erf(Real<kF> a) {
    return erff(a.value);
}
// log(1 + e^a), and a above 20, as in torch.
template <bool kF>
OSTINATO_DEVICE Real<kF> softplus(Real<kF> a) {
    return a.value > 20.0f ? a.value : log1pf(expf(a.value));
}
template <bool kF>
OSTINATO_DEVICE Real<kF> abs(Real<kF> a) {
    return float_of(bits_of(a.value) & 0x7fffffffu);
}
// a where both are equal. NaN of either side wins, as in torch.
template <bool kF>
OSTINATO_DEVICE Real<kF> maximum(Real<kF> a, Real<kF> b) {
    return b.value > a.value || b.value != b.value ? b : a;
}
template <bool kF>
OSTINATO_DEVICE Real<kF> minimum(Real<kF> a, Real<kF> b) {
    return b.value < a.value || b.value != b.value ? b : a;
}

// A mask is 1 where the condition holds, 0 where not: a value that 16 bits keep.
template <bool kF>
OSTINATO_DEVICE Real<kF> lt(Real<kF> a, Real<kF> b) {
    return a.value < b.value ? 1.0f : 0.0f;
}
template <bool kF>
OSTINATO_DEVICE Real<kF> le(Real<kF> a, Real<kF> b) {
    return a.value <= b.value ? 1.0f : 0.0f;
}
template <bool kF>
OSTINATO_DEVICE Real<kF> gt(Real<kF> a, Real<kF> b) {
    return a.value > b.value ? 1.0f : 0.0f;
}
template <bool kF>
OSTINATO_DEVICE Real<kF> ge(Real<kF> a, Real<kF> b) {
    return a.value >= b.value ? 1.0f : 0.0f;
}
template <bool kF>
OSTINATO_DEVICE Real<kF> eq(Real<kF> a, Real<kF> b) {
    return a.value == b.value ? 1.0f : 0.0f;
}
template <bool kF>
OSTINATO_DEVICE Real<kF> ne(Real<kF> a, Real<kF> b) {
    return a.value != b.value ? 1.0f : 0.0f;
}
template <bool kF>
OSTINATO_DEVICE Real<kF> logical_and(Real<kF> a, Real<kF> b) {
    return a.value * b.value;
}
template <bool kF>
OSTINATO_DEVICE Real<kF> logical_or(Real<kF> a, Real<kF> b) {
    return a.value != 0.0f ? a : b;
}
template <bool kF>
OSTINATO_DEVICE Real<kF> logical_not(Real<kF> a) {
    return 1.0f - a.value;
}
template <bool kF>
OSTINATO_DEVICE Real<kF> select(Real<kF> mask, Real<kF> a, Real<kF> b) {
    return mask.value != 0.0f ? a : b;
}

}  // namespace
}  // namespace ostinato

// What one GPU charges for the ways in which blocks can hand each other a step of a recurrence. Compiled by NVRTC for
// the device that runs it (micro.py), so no header is included.
//
// Every kernel repeats one handoff `rounds` times between two reads of the clock, and thread 0 of block 0 writes
//   out[0]  cycles of its multiprocessor
//   out[1]  nanoseconds of %globaltimer, whose ticks may be a microsecond: use many rounds
//   out[2]  a sum of what was received, which micro.py compares with what must have come
// Arguments are 8 bytes wide, as the launcher passes Python's integers.
//
// Memory: `out` is three words; `flags` is zeroed by the caller before each launch and written by all blocks. Kernels
// that wait for another block need all blocks resident at once: clusters are by nature, the rest is launched
// cooperatively.

typedef unsigned int u32;
typedef unsigned long long u64;

// One cache line for each flag: two flags in one line would be handed over together.
constexpr u64 LINE = 32;

__device__ __forceinline__ u64 nanoseconds() {
    u64 t;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(t)::"memory");
    return t;
}

__device__ __forceinline__ u64 cycles() {
    u64 t;
    asm volatile("mov.u64 %0, %%clock64;" : "=l"(t)::"memory");
    return t;
}

struct Stopwatch {
    u64 cycle, ns;
    __device__ void start() {
        ns = nanoseconds();
        cycle = cycles();
    }
    __device__ void stop(u64* out, u64 sum) {
        out[0] = cycles() - cycle;
        out[1] = nanoseconds() - ns;
        out[2] = sum;
    }
};

// ---- one word through the second-level cache ----

struct Relaxed {
    static __device__ void store(u32* p, u32 v) {
        asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
    }
    static __device__ u32 load(u32* p) {
        u32 v;
        asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
        return v;
    }
};

struct Volatile {
    static __device__ void store(u32* p, u32 v) {
        asm volatile("st.volatile.global.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
    }
    static __device__ u32 load(u32* p) {
        u32 v;
        asm volatile("ld.volatile.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
        return v;
    }
};

// What a flag costs that also orders the data beside it.
struct Ordered {
    static __device__ void store(u32* p, u32 v) {
        asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
    }
    static __device__ u32 load(u32* p) {
        u32 v;
        asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
        return v;
    }
};

// There and back between block 0 and block `partner`; the others leave at once. A round is two handoffs.
template <class Memory>
__device__ void flag_pingpong(u64* out, u32* flags, u64 rounds, u64 partner) {
    if (threadIdx.x != 0 || (blockIdx.x != 0 && blockIdx.x != partner)) return;
    u32 *mine = flags, *theirs = flags + LINE;
    u64 sum = 0;
    if (blockIdx.x == 0) {
        Stopwatch watch;
        watch.start();
        for (u32 round = 1; round <= rounds; ++round) {
            Memory::store(theirs, round);
            u32 seen;
            do seen = Memory::load(mine);
            while (seen != round);
            sum += seen;
        }
        watch.stop(out, sum);
    } else {
        for (u32 round = 1; round <= rounds; ++round) {
            while (Memory::load(theirs) != round) {}
            Memory::store(mine, round);
        }
    }
}

extern "C" __global__ void flag_relaxed(u64* out, u32* flags, u64 rounds, u64 partner) {
    flag_pingpong<Relaxed>(out, flags, rounds, partner);
}
extern "C" __global__ void flag_volatile(u64* out, u32* flags, u64 rounds, u64 partner) {
    flag_pingpong<Volatile>(out, flags, rounds, partner);
}
extern "C" __global__ void flag_ordered(u64* out, u32* flags, u64 rounds, u64 partner) {
    flag_pingpong<Ordered>(out, flags, rounds, partner);
}

// ---- all blocks of a cooperative grid ----

// The barrier of a cooperative launch: one counter that only grows, so that it is never reset.
extern "C" __global__ void grid_barrier(u64* out, u32* flags, u64 rounds) {
    Stopwatch watch;
    watch.start();
    for (u64 round = 1; round <= rounds; ++round) {
        // Orders what all threads of the block wrote before the arrival of thread 0.
        __syncthreads();
        if (threadIdx.x == 0) {
            asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(flags) : "memory");
            while (Ordered::load(flags) < round * gridDim.x) {}
        }
        // Holds the block until thread 0 has seen everyone.
        __syncthreads();
    }
    if (blockIdx.x == 0 && threadIdx.x == 0) watch.stop(out, rounds);
}

// Readiness carried in the data: each block writes one word, and thread i of every block waits for the word of block
// i. No block can be two rounds ahead of another, because it needs everyone's word of the round between.
extern "C" __global__ void grid_words(u64* out, u32* flags, u64 rounds) {
    Stopwatch watch;
    watch.start();
    u64 sum = 0;
    for (u32 round = 1; round <= rounds; ++round) {
        if (threadIdx.x == 0) Relaxed::store(flags + blockIdx.x * LINE, round);
        for (u32 i = threadIdx.x; i < gridDim.x; i += blockDim.x) {
            u32 seen;
            do seen = Relaxed::load(flags + i * LINE);
            while (seen < round);
            if (i == 0) sum += round;
        }
        // The whole block has its words before any thread writes the next.
        __syncthreads();
    }
    if (blockIdx.x == 0 && threadIdx.x == 0) watch.stop(out, sum);
}

// ---- one block, and nothing at all ----

extern "C" __global__ void block_barrier(u64* out, u64 rounds) {
    Stopwatch watch;
    watch.start();
    for (u64 round = 0; round < rounds; ++round) __syncthreads();
    if (blockIdx.x == 0 && threadIdx.x == 0) watch.stop(out, rounds);
}

extern "C" __global__ void nothing() {}

#if __CUDA_ARCH__ >= 900
// ---- clusters: Hopper and later ----

__device__ __forceinline__ u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

__device__ __forceinline__ u32 rank_in_cluster() {
    u32 r;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(r));
    return r;
}

__device__ __forceinline__ u32 cluster_blocks() {
    u32 n;
    asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(n));
    return n;
}

// Where `address` of this block's shared memory lies in block `rank`.
__device__ __forceinline__ u32 remote(u32 address, u32 rank) {
    u32 r;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(r) : "r"(address), "r"(rank));
    return r;
}

// Aligned: all threads of a warp must come here together.
__device__ __forceinline__ void cluster_sync() {
    asm volatile("barrier.cluster.arrive.release.aligned;\n\tbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

__device__ __forceinline__ void barrier_init(u32 barrier) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(barrier) : "memory");
}

// Makes the barriers visible to the other blocks' pushes; cluster_sync() must follow.
__device__ __forceinline__ void barrier_fence() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

// The one arrival of a phase: it ends when `bytes` have been pushed.
__device__ __forceinline__ void barrier_expect(u32 barrier, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

__device__ __forceinline__ void barrier_wait(u32 barrier, u32 parity) {
    u32 done;
    do
        asm volatile(
            "{\n\t.reg .pred p;\n\t"
            "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2;\n\t"
            "selp.u32 %0, 1, 0, p;\n\t}"
            : "=r"(done)
            : "r"(barrier), "r"(parity)
            : "memory");
    while (!done);
}

__device__ __forceinline__ void push(u32 address, u32 value, u32 barrier) {
    asm volatile(
        "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.u32 [%0], %1, [%2];" ::"r"(address),
        "r"(value), "r"(barrier)
        : "memory");
}

__device__ __forceinline__ void push4(u32 address, u32 value, u32 barrier) {
    asm volatile(
        "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %1, %1, %1}, [%2];" ::"r"(address),
        "r"(value), "r"(barrier)
        : "memory");
}

extern "C" __global__ void cluster_barrier(u64* out, u64 rounds) {
    Stopwatch watch;
    watch.start();
    for (u64 round = 0; round < rounds; ++round) cluster_sync();
    if (blockIdx.x == 0 && threadIdx.x == 0) watch.stop(out, rounds);
}

// One word there and back between the two blocks of a cluster. A round is two pushes.
extern "C" __global__ void push_pingpong(u64* out, u64 rounds) {
    __shared__ __align__(16) u32 slot;
    __shared__ __align__(8) u64 storage;
    const u32 barrier = shared_address(&storage), rank = rank_in_cluster();
    const u32 their_slot = remote(shared_address(&slot), rank ^ 1), their_barrier = remote(barrier, rank ^ 1);
    if (threadIdx.x == 0) {
        barrier_init(barrier);
        barrier_fence();
        barrier_expect(barrier, 4);
    }
    // No push may come before the barrier that counts it.
    __syncwarp();
    cluster_sync();
    if (threadIdx.x == 0) {
        const volatile u32* received = &slot;
        u64 sum = 0;
        Stopwatch watch;
        watch.start();
        for (u32 round = 0; round < rounds; ++round) {
            if (rank == 0) push(their_slot, round, their_barrier);
            barrier_wait(barrier, round & 1);
            sum += *received;
            // Before the answer, since the peer's next push may follow on it at once.
            if (round + 1 < rounds) barrier_expect(barrier, 4);
            if (rank == 1) push(their_slot, round, their_barrier);
        }
        if (rank == 0) watch.stop(out, sum);
    }
    // A block may not leave while another can still write into its shared memory.
    __syncwarp();
    cluster_sync();
}

// What a step of a recurrence split over a cluster exchanges: every block pushes its slice of `chunks` x 16 bytes per
// thread to every block, itself included, and waits until all slices have come. Two buffers and two barriers: whoever
// pushes round k + 2 has everyone's round k + 1, which each sent after it had read round k.
// Dynamic shared memory: 2 x blocks of the cluster x chunks x blockDim.x x 16 bytes.
extern "C" __global__ void push_exchange(u64* out, u64 rounds, u64 chunks) {
    extern __shared__ __align__(16) u32 buffer[];
    __shared__ __align__(8) u64 storage[2];
    const u32 blocks = cluster_blocks(), rank = rank_in_cluster();
    const u32 slice = (u32)chunks * blockDim.x * 16, all = slice * blocks;
    const u32 data = shared_address(buffer), barriers = shared_address(storage);
    if (threadIdx.x == 0) {
        barrier_init(barriers);
        barrier_init(barriers + 8);
        barrier_fence();
        barrier_expect(barriers, all);
    }
    // No push may come before the barrier that counts it.
    __syncwarp();
    cluster_sync();
    u64 sum = 0;
    Stopwatch watch;
    watch.start();
    for (u32 round = 0; round < rounds; ++round) {
        const u32 half = round & 1;
        // The next round's, before anyone can have got this round's slice from here.
        if (threadIdx.x == 0 && round + 1 < rounds) barrier_expect(barriers + 8 * (half ^ 1), all);
        // Orders that before every thread's pushes.
        __syncthreads();
        const u32 place = data + half * all + rank * slice + threadIdx.x * 16;
        // Each block begins with another peer, so that they do not all push at one.
        for (u32 i = 0; i < blocks; ++i) {
            const u32 peer = (rank + i) % blocks;
            const u32 there = remote(place, peer), barrier = remote(barriers + 8 * half, peer);
            for (u32 chunk = 0; chunk < chunks; ++chunk) push4(there + chunk * blockDim.x * 16, round, barrier);
        }
        barrier_wait(barriers + 8 * half, (round >> 1) & 1);
        // The last word of the last block's slice.
        sum += ((const volatile u32*)buffer)[((half + 1) * all) / 4 - 1];
    }
    if (rank == 0 && blockIdx.x == 0 && threadIdx.x == 0) watch.stop(out, sum);
    // A block may not leave while another can still write into its shared memory.
    __syncwarp();
    cluster_sync();
}
#endif

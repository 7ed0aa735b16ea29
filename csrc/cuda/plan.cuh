// The constants of one kernel, from macros that src/ostinato/cuda/config.py sets.
//
// A batch tile is kRows rows in kGroups groups of kGroupRows. kBlocks blocks share its loop, each owning kUnits units of the padded
// hidden size and, of weight_hh, what these units need. Groups take turns in a step, so that the exchange of one passes while
// another is computed. A group is one or more eights, the rows of an instruction: weights that are read, barriers and the exchange
// serve all of a group at once.
#pragma once

#include "device.h"

namespace ostinato {
namespace {

// How the blocks of a tile hand each other their part of a step.
enum class Exchange {
    kBlock,  // one block: its own shared memory; several where a cell has no hidden product, so that nothing is exchanged
    kCluster,  // a cluster: pushed into each other's shared memory, bytes counted by barriers there (sm_90)
    kGrid,  // any blocks that run at once: words in global memory, each with a mark of the step it belongs to
};

constexpr int kHidden = OSTINATO_HIDDEN, kBlocks = OSTINATO_BLOCKS, kUnits = OSTINATO_UNITS, kWarps = OSTINATO_WARPS;
constexpr int kGroups = OSTINATO_GROUPS, kResident = OSTINATO_RESIDENT;
constexpr Exchange kExchange = Exchange::OSTINATO_EXCHANGE;

constexpr int kGroupRows = OSTINATO_GROUP_ROWS, kEights = kGroupRows / 8;
constexpr int kRows = kGroups * kGroupRows;
constexpr int kThreads = kWarps * 32;
constexpr int kPadded = kBlocks * kUnits;
constexpr bool kIsEven = kHidden % 2 == 0;  // pairs of units are aligned
// Whether a unit of a block's part exists; where H has no padding, all do.
OSTINATO_DEVICE bool is_unit(int unit) { return kPadded == kHidden || unit < kHidden; }

static_assert(kEights * 8 == kGroupRows, "whole eights");
static_assert(kUnits % 16 == 0 && kPadded >= kHidden, "units of a block");
static_assert(kGroups == 1 || kGroups % 2 == 0, "halves alternate");

// Where several groups take turns, a barrier lies between two uses of the same half, so that one barrier per group suffices.
constexpr int kHalves = kGroups > 1 ? 2 : 1;
// A pushed value may arrive while the one before is still read.
constexpr int kBuffers = kExchange == Exchange::kCluster ? 2 : 1;

// An epilogue works on pairs of neighbouring units of a row, neighbouring pairs in neighbouring threads.
constexpr int kGroupPairs = kGroupRows * kUnits / 2;
constexpr int kPairs = (kGroupPairs + kThreads - 1) / kThreads;

constexpr int largest(int a, int b) { return a > b ? a : b; }
// The largest divisor of n that is not above the limit.
constexpr int divisor_within(int limit, int n) { return n % limit == 0 ? limit : divisor_within(limit - 1, n); }

}  // namespace
}  // namespace ostinato

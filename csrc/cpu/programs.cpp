#include "programs.h"

#include <algorithm>
#include <atomic>
#include <mutex>
#include <stdexcept>

namespace ostinato {
namespace {

struct Kept {
    Program program;
    std::vector<Instruction> code[3];
    std::vector<double> numbers[3];
};

// Readers take no lock: a cell is whole before it is counted, and blocks neither move nor go.
constexpr int kBlock = 256, kBlocks = 1024;
std::mutex g_mutex;
std::atomic<const Kept*> g_blocks[kBlocks];
std::atomic<int> g_count{0};

const char* const kNames[] = {
#define OSTINATO_NAME(name) #name,
    OSTINATO_OPERATIONS(OSTINATO_NAME)
#undef OSTINATO_NAME
};
constexpr int kOperations = sizeof(kNames) / sizeof(kNames[0]);

#define OSTINATO_COUNT(name) +1
constexpr int kLoads = 0 OSTINATO_LOADS(OSTINATO_COUNT), kStores = 0 OSTINATO_STORES(OSTINATO_COUNT);
constexpr int kUnary = 0 OSTINATO_UNARY(OSTINATO_COUNT), kBinary = 0 OSTINATO_BINARY(OSTINATO_COUNT);
#undef OSTINATO_COUNT

void require(bool holds, const std::string& what) {
    if (!holds) throw std::invalid_argument("own cell: expected " + what);
}

// How many there are of what a load or a store names by its index; 0 where this program has none of it.
int extent(Operation operation, const Program& p, const uint8_t* is_joint, int index, bool is_backward) {
    const Traits& t = p.traits;
    const bool is_one = index >= 0 && index < kMostGates && is_joint[index];
    switch (operation) {
        case Operation::k_gate:
            return is_backward || !is_one ? 0 : t.gates;
        case Operation::k_x:
            return is_backward || is_one ? 0 : t.input_gates;
        case Operation::k_h:
            return is_backward || is_one ? 0 : t.gates;
        case Operation::k_state:
            return 1 + t.behind;
        case Operation::k_parameter:
            return t.parameters;
        case Operation::k_drive:
            return t.drives;
        case Operation::k_saved:
            return is_backward ? t.saved : 0;
        case Operation::k_output:
            return is_backward && t.uses_output ? 1 : 0;
        case Operation::k_grad:
            return is_backward ? 1 + t.behind : 0;
        case Operation::k_next:
            return is_backward ? 0 : 1 + t.behind;
        case Operation::k_save:
            return is_backward ? 0 : t.saved;
        case Operation::k_slot:
            return is_backward ? t.grads - t.drives : 0;
        case Operation::k_to_state:
            return is_backward ? 1 + t.behind : 0;
        case Operation::k_to_drive:
            return is_backward ? t.drives : 0;
        default:
            return 0;
    }
}

Code checked(const CodeText& text, const Program& p, const uint8_t* is_joint, bool is_backward, std::vector<Instruction>& code,
             std::vector<double>& numbers) {
    numbers = text.numbers;
    const int registers = text.registers, constants = static_cast<int>(numbers.size());
    require(registers >= 1 && registers <= 256 && constants <= registers, "1 to 256 registers, numbers among them");
    require(text.code.size() % 5 == 0, "five numbers for each instruction");
    std::vector<uint8_t> is_set(static_cast<size_t>(registers));
    for (int i = 0; i < constants; i++) is_set[static_cast<size_t>(i)] = 1;
    bool stores = false;
    for (size_t i = 0; i < text.code.size(); i += 5) {
        const int *at = &text.code[i], op = at[0], to = at[1];
        require(op >= 0 && op < kOperations, "an operation");
        const auto operation = static_cast<Operation>(op);
        const auto read = [&](int operand) {
            const bool is_one = operand >= 0 && operand < registers && is_set[static_cast<size_t>(operand)];
            require(is_one, "a register that holds something");
        };
        const bool is_load = op < kLoads, is_store = !is_load && op < kLoads + kStores;
        const int index = is_load ? at[2] : to;
        if (is_load || is_store) {
            require(index >= 0 && index < extent(operation, p, is_joint, index, is_backward),
                    std::string(kNames[op]) + " of an index that there is, got " + std::to_string(index));
            require(!(is_load && stores), "all loads before all stores");
            stores |= is_store;
        }
        if (is_store) {
            read(at[2]);
        } else {
            if (!is_load) {
                const int count = op < kLoads + kStores + kUnary ? 1 : op < kLoads + kStores + kUnary + kBinary ? 2 : 3;
                for (int k = 0; k < count; k++) read(at[2 + k]);
            }
            require(to >= constants && to < registers, "a register to write that is no number's");
            is_set[static_cast<size_t>(to)] = 1;
        }
        const auto byte = [](int value) { return static_cast<uint8_t>(value); };
        code.push_back({operation, byte(to), byte(at[2]), byte(at[3]), byte(at[4])});
    }
    return {code.data(), static_cast<int64_t>(code.size()), numbers.data(), constants, registers};
}

}  // namespace

std::vector<std::string> operations() { return {kNames, kNames + kOperations}; }

const Program* program_of(Cell cell) {
    const int place = static_cast<int>(cell) - kFirstOwn;
    if (place < 0 || place >= g_count.load(std::memory_order_acquire)) return nullptr;
    return &g_blocks[place / kBlock].load(std::memory_order_acquire)[place % kBlock].program;
}

const Traits& traits_of_program(Cell cell) { return program_of(cell)->traits; }

int define_cell(Traits traits, const std::vector<int>& joint, const CodeText& forward, const CodeText& forward_keep,
                const CodeText& backward) {
    const auto is_between = [](int value, int low, int high) { return value >= low && value <= high; };
    require(is_between(traits.gates, 0, kMostGates) && is_between(traits.input_gates, 0, kMostGates), "at most 8 gates");
    require(traits.gates + traits.input_gates > 0, "a gate");
    require(is_between(traits.behind, 0, 15) && is_between(traits.parameters, 0, 64) && is_between(traits.drives, 0, 16),
            "at most 16 states, 64 parameters and 16 drives");
    require(is_between(traits.saved, traits.behind, 128), "saved values, the states behind h among them");
    uint8_t is_joint[kMostGates] = {};
    for (int gate : joint) {
        require(is_between(gate, 0, std::min(traits.gates, traits.input_gates) - 1), "joint gates of both products");
        is_joint[gate] = 1;
    }
    Kept kept{};
    Program& p = kept.program;
    int slots = traits.gates;
    for (int gate = 0; gate < traits.input_gates; gate++)
        p.input_slots[gate] = static_cast<uint8_t>(is_joint[gate] ? gate : slots++);
    traits.grads = slots + traits.parameters + traits.drives;
    traits.recomputed = traits.behind, traits.has_c = traits.behind > 0, traits.projects = false;
    p.traits = traits;

    const std::lock_guard<std::mutex> lock(g_mutex);
    const int place = g_count.load(std::memory_order_relaxed);
    require(place < kBlock * kBlocks, "fewer cells in one process");
    if (!g_blocks[place / kBlock].load(std::memory_order_relaxed))
        g_blocks[place / kBlock].store(new Kept[kBlock], std::memory_order_release);
    // Where it stays, so that its code may point into it.
    Kept& stays = const_cast<Kept&>(g_blocks[place / kBlock].load(std::memory_order_relaxed)[place % kBlock]);
    stays = kept;
    const CodeText* const texts[] = {&forward, &forward_keep, &backward};
    Code* const codes[] = {&stays.program.forward, &stays.program.forward_keep, &stays.program.backward};
    for (int i = 0; i < 3; i++) {
        const bool is_backward = i == 2;
        *codes[i] = checked(*texts[i], stays.program, is_joint, is_backward, stays.code[i], stays.numbers[i]);
    }
    g_count.store(place + 1, std::memory_order_release);
    return kFirstOwn + place;
}

}  // namespace ostinato

// The own cells that this process knows, by number.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "program.h"

namespace ostinato {

// Five numbers for each instruction: operation, to, a, b, c.
struct CodeText {
    std::vector<int> code;
    std::vector<double> numbers;
    int registers = 0;
};

// Names of the operations; an operation's number is its place.
std::vector<std::string> operations();

// Adds a cell and returns its number. Of its traits `grads` and `recomputed` are found here. joint: gates that take both products
// in one sum. Throws std::invalid_argument where a program leaves its arrays.
int define_cell(Traits traits, const std::vector<int>& joint, const CodeText& forward, const CodeText& forward_keep,
                const CodeText& backward);

}  // namespace ostinato

// Whether what a step says can be: all of it is looked at before anything is read or written by it.

#pragma once

#include <algorithm>

#include "native_layer.h"

// What is told to Python, by number (`_WRONG`, native_attend.py).
enum What : int64_t { FINE, BEGINS, FALLS, ENDS, SHORT, LENGTH, ENTRY, MEMORY };

struct Told {
    int64_t what, row, a, b;  // what is wrong, where, and the values
    int64_t entries;          // above all that the step's queries see
    int64_t trunks;
};

// `tokens`: new ones in all; `width`: of the table, in pages.
static Told check_step(const Layer& layer, const Step& step, int64_t tokens, int64_t width) {
    if (step.cu_q[0]) return {BEGINS, 0, step.cu_q[0]};
    if (step.cu_q[step.rows] != tokens) return {ENDS, 0, step.cu_q[step.rows], tokens};
    int32_t highest = -1;
    for (int64_t row = 0; row < step.rows; row++) {
        const int64_t many = step.tokens(row), length = step.lengths[row];
        if (many < 0) return {FALLS, row, step.cu_q[row], step.cu_q[row + 1]};
        if (length < many) return {SHORT, row, length, many};
        if (!many) continue;  // sees nothing
        if ((length + PAGE - 1) / PAGE > width) return {LENGTH, row, length, width};
        const int32_t* pages = step.pages(row);
        const int64_t first = layer.first_seen(length - many) / PAGE;
        const int64_t last = (length - 1) / PAGE;
        uint32_t most = 0;  // a negative entry is above all others
        for (int64_t page = first; page <= last; page++)
            most = std::max(most, uint32_t(pages[page]));
        if (most >= uint64_t(layer.entries))
            for (int64_t page = first; page <= last; page++)
                if (uint32_t(pages[page]) >= uint64_t(layer.entries))
                    return {ENTRY, row, page, pages[page]};
        highest = std::max(highest, int32_t(most));
    }
    return {FINE, 0, 0, 0, int64_t(highest) + 1};
}

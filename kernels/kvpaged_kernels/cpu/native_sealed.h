// Pages of which some are sealed: where they lie, and their numbers unpacked.

#pragma once

#include "native_codes.h"
#include "native_few.h"

constexpr int UNPACKED = 64;  // tokens at most

struct Pages {
    Layer layer;  // of exact pages
    const uint8_t* slices;
    int64_t slice_entry, sealed_entries;
    int64_t keep;  // pages from the first on that are exact

    const uint8_t* head_of(int64_t entry, int64_t head) const {
        return slices + entry * slice_entry + head * HEAD;
    }
};

// K of `count` tokens from `slot` on, side by side.
static void unpack_k(const uint8_t* head, int slot, int count, Number* to) {
    if (K_FORM == EXACT) {
        memcpy(to, head + slot * K_BYTES, count * K_BYTES);
        return;
    }
    for (int d = 0; d < K_DIM; d += VL) {
        Floats scale = {}, low = {};
        if (K_FORM == FP8) low = of_halves(load_words(head + K_PARAMS + 2 * d));
        for (int t = slot; t < slot + count; t++) {
            if (K_WHOLE && (t % K_PER == 0 || t == slot))
                meaning_of<K_FORM>(
                    load_words(head + K_PARAMS + 2 * (t / K_PER * K_DIM + d)), scale, low);
            const Floats code = codes_at<K_FORM, K_DIM>(head + t * K_BYTES, d);
            narrow(to + (t - slot) * K_DIM + d, K_WHOLE ? code * scale + low : code + low);
        }
    }
}

// V of `count` tokens from `slot` on, side by side; of integers, both multiples of 16.
static void unpack_v(const uint8_t* head, int slot, int count, Number* to) {
    const uint8_t* codes = head + V_CODES;
    if (V_FORM == EXACT) {
        memcpy(to, codes + slot * V_BYTES, count * V_BYTES);
        return;
    }
    Floats scale[UNPACKED / VL], low[UNPACKED / VL];
    for (int d = 0; d < V_DIM; d += VL) {
        if (V_WHOLE && d % V_PER == 0)
            for (int t = 0; t < count; t += VL)
                meaning_of<V_FORM>(load_words(head + V_PARAMS + 2 * (d / V_PER * PAGE + slot + t)),
                                   scale[t / VL], low[t / VL]);
        for (int t = 0; t < count; t++) {
            const Floats code = codes_at<V_FORM, V_DIM>(codes + (slot + t) * V_BYTES, d);
            if (V_WHOLE)
                narrow(to + t * V_DIM + d, code * scale[t / VL][t % VL] + low[t / VL][t % VL]);
            else
                narrow(to + t * V_DIM + d, code);
        }
    }
}

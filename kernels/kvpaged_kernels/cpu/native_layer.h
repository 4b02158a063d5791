// A layer's pages, a step over them, and a softmax that is under way.
//
// Constants: FLOAT, BFLOAT16 or HALF; GROUP query heads a KV head; K_DIM, V_DIM; PAGE slots a page.

#pragma once

#include <cmath>

#include "native_math.h"

constexpr int K_VECTORS = K_DIM / VL, K_REST = K_DIM % VL, K_ROOM = (K_DIM + VL - 1) / VL;
constexpr int V_VECTORS = V_DIM / VL, V_REST = V_DIM % VL, V_ROOM = (V_DIM + VL - 1) / VL;
constexpr int K_WIDTH = K_ROOM * VL, V_WIDTH = V_ROOM * VL;  // numbers, with what fills vectors

struct Layer {
    Number *k, *v;
    int64_t k_entry, k_head, k_slot, v_entry, v_head, v_slot;  // strides, in numbers
    int64_t kv_heads, entries;
    int64_t window;  // tokens a query sees; 0: all
    float scale, softcap;  // 0: none

    // The first position that a query at this one sees.
    int64_t first_seen(int64_t query) const {
        return window && query >= window ? query - window + 1 : 0;
    }
    Number* key(int64_t entry, int64_t head, int64_t slot) const {
        return k + entry * k_entry + head * k_head + slot * k_slot;
    }
    Number* value(int64_t entry, int64_t head, int64_t slot) const {
        return v + entry * v_entry + head * v_head + slot * v_slot;
    }
};

struct Step {
    const int32_t *table, *lengths, *cu_q;  // row i's new tokens: [cu_q[i], cu_q[i + 1])
    int64_t table_row, rows;
    int64_t q_row, q_head, k_row, k_head, v_row, v_head;  // strides of what is new

    const int32_t* pages(int64_t row) const { return table + row * table_row; }
    int64_t tokens(int64_t row) const { return int64_t(cu_q[row + 1]) - cu_q[row]; }
};

// What a call of a layer is given. q: [tokens, heads, K_DIM], k, v: [tokens, kv_heads, ...] by the
// strides of the step; sinks: [heads] or null; out: [tokens, heads, V_DIM], contiguous.
struct Call {
    const Layer& layer;
    const Step& step;
    const Number *q, *k, *v;
    const float* sinks;
    Number* out;

    const Number* query(int64_t token, int64_t head) const {
        return q + token * step.q_row + head * GROUP * step.q_head;
    }
    Number* output(int64_t token, int64_t head) const {
        return out + (token * layer.kv_heads + head) * GROUP * V_DIM;
    }
    const float* sinks_of(int64_t head) const { return sinks ? sinks + head * GROUP : nullptr; }

    // Put a new token's K and V of one head where they belong.
    void write(int64_t token, int64_t head, int64_t entry, int64_t slot) const {
        memcpy(layer.key(entry, head, slot), k + token * step.k_row + head * step.k_head,
               K_DIM * sizeof(Number));
        memcpy(layer.value(entry, head, slot), v + token * step.v_row + head * step.v_head,
               V_DIM * sizeof(Number));
    }
};

// One token's queries of a KV head over a part of what they see: out = sum exp(score - most) v.
struct Part {
    float most[GROUP], sum[GROUP];
    Floats out[GROUP][V_ROOM];
};

// What is taken from scores that are at most `most`. Of scores that are all -inf, or NaN where they
// aren't (no comparison finds those), nothing: -inf less itself would be NaN.
static inline float base_of(float most) { return most == -INFINITY ? 0 : most; }

static void merge(Part& into, const Part& part) {
    for (int g = 0; g < GROUP; g++) {
        const float most = into.most[g] > part.most[g] ? into.most[g] : part.most[g];
        const float base = base_of(most);
        const float a = std::exp(into.most[g] - base), b = std::exp(part.most[g] - base);
        into.most[g] = most;
        into.sum[g] = into.sum[g] * a + part.sum[g] * b;
        for (int d = 0; d < V_ROOM; d++) into.out[g][d] = into.out[g][d] * a + part.out[g][d] * b;
    }
}

static void clear(Part& part) {
    for (int g = 0; g < GROUP; g++) {
        part.most[g] = -INFINITY;
        part.sum[g] = 0;
        for (int d = 0; d < V_ROOM; d++) part.out[g][d] = Floats{};
    }
}

// The output of a part, whose sinks take their share.
static void finish(const Part& part, const float* sinks, Number* out) {
    for (int g = 0; g < GROUP; g++, out += V_DIM) {
        float sum = part.sum[g], factor = 1;
        if (sinks) {
            const float most = sinks[g] > part.most[g] ? sinks[g] : part.most[g];
            factor = std::exp(part.most[g] - most);
            sum = sum * factor + std::exp(sinks[g] - most);
        }
        for (int d = 0; d < V_VECTORS; d++) narrow(out + d * VL, part.out[g][d] * (factor / sum));
        for (int d = 0; d < V_REST; d++)
            out[V_VECTORS * VL + d] = of_float(part.out[g][V_VECTORS][d] * (factor / sum));
    }
}

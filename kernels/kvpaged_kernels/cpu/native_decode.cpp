// One token a row: its K and V into their slot, and attention over the row's pages.
//
// All rows' pages, a KV head after the other, are one line of work, cut into equal shares, one a
// thread, wherever that falls. Where it cuts a row's head, the parts are merged by their
// log-sum-exp, which is exact. Scores and sums are fp32.
//
// Constants: FLOAT, BFLOAT16 or HALF; GROUP query heads a KV head; K_DIM, V_DIM; PAGE slots a page.

#include <cmath>
#include <vector>

#include "native_numbers.h"
#include "native_threads.h"

constexpr int SLICE = PAGE < 64 ? PAGE : 64;           // tokens scored at a time
constexpr int SCORES = (SLICE + VL - 1) / VL * VL;     // and room for them
constexpr int K_VECTORS = K_DIM / VL, K_REST = K_DIM % VL, K_ROOM = (K_DIM + VL - 1) / VL;
constexpr int V_VECTORS = V_DIM / VL, V_REST = V_DIM % VL, V_ROOM = (V_DIM + VL - 1) / VL;
constexpr int64_t FEW = 1 << 16;  // numbers that one thread reads as soon as two would
constexpr int HEADS = GROUP % 4 == 0 ? 4 : GROUP % 3 == 0 ? 3 : GROUP % 2 == 0 ? 2 : 1;  // at a time

struct Layer {
    Number *k, *v;
    int64_t k_entry, k_head, k_slot, v_entry, v_head, v_slot;  // strides, in numbers
    int64_t kv_heads;
    int64_t window;  // tokens a query sees; 0: all
    float scale, softcap;  // 0: none
};

struct Step {
    const int32_t *table, *lengths;
    int64_t table_row, rows;
    int64_t q_row, q_head, k_row, k_head, v_row, v_head;  // strides of what is new
};

struct Part {
    float most[GROUP], sum[GROUP];
    Floats out[GROUP][V_ROOM];
};

static inline Floats shuffle_pairs_low(Floats a, Floats b) {
#ifdef __AVX512F__
    return __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
#else
    return __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14);
#endif
}
static inline Floats shuffle_pairs_high(Floats a, Floats b) {
#ifdef __AVX512F__
    return __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
#else
    return __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15);
#endif
}

// The sum of each of VL vectors, as one vector.
static inline Floats sums_of(Floats* v) {
#pragma GCC unroll 8
    for (int count = VL; count > 1; count /= 2)
#pragma GCC unroll 8
        for (int i = 0; i < count / 2; i++)
            v[i] = shuffle_pairs_low(v[2 * i], v[2 * i + 1]) +
                   shuffle_pairs_high(v[2 * i], v[2 * i + 1]);
    return v[0];
}

// e^x to 2 units in the last place (Cephes); x below -87 gives about 1e-38.
static inline Floats exp_of(Floats x) {
    for (int i = 0; i < VL; i++) x[i] = x[i] < -87.0f ? -87.0f : x[i] > 88.0f ? 88.0f : x[i];
    const Floats shifted = x * 1.44269504f + 12582912.0f;  // rounds in the lowest bits
    const Floats n = shifted - 12582912.0f;
    const Floats r = x - n * 0.693359375f + n * 2.12194440e-4f;
    Floats p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    return (Floats)((Ints)p + ((Ints)shifted << 23));
}

static inline Floats rest_of(const Number* p, int count) {
    Number room[VL] = {};
    memcpy(room, p, count * sizeof(Number));
    return widen(room);
}

// Scores of `count` tokens, `row` numbers apart, into scores[GROUP][SCORES].
static inline void score(
    const Floats (*q)[K_ROOM], const Number* k, int64_t row, int count, const Layer& layer,
    float (*scores)[SCORES]) {
    for (int first = 0; first < count; first += VL) {
        const int some = count - first < VL ? count - first : VL;
        for (int head = 0; head < GROUP; head += HEADS) {
            Floats sums[HEADS][VL];
            for (int t = 0; t < VL; t++) {
                const Number* token = k + (first + (t < some ? t : some - 1)) * row;
                Floats sum[HEADS] = {};
#pragma GCC unroll 16
                for (int d = 0; d < K_VECTORS; d++) {
                    const Floats x = widen(token + d * VL);
#pragma GCC unroll 4
                    for (int h = 0; h < HEADS; h++) sum[h] += q[head + h][d] * x;
                }
                if (K_REST) {
                    const Floats x = rest_of(token + K_VECTORS * VL, K_REST);
                    for (int h = 0; h < HEADS; h++) sum[h] += q[head + h][K_VECTORS] * x;
                }
                for (int h = 0; h < HEADS; h++) sums[h][t] = sum[h];
            }
            for (int h = 0; h < HEADS; h++) {
                Floats s = sums_of(sums[h]) * layer.scale;
                if (layer.softcap)
                    s = layer.softcap - 2 * layer.softcap / (exp_of(s * (2 / layer.softcap)) + 1.0f);
                store(scores[head + h] + first, s);
            }
        }
    }
}

// Add tokens to a part.
static inline void add(
    const Floats (*q)[K_ROOM], const Number* k, const Number* v, int count, const Layer& layer,
    Part& part) {
    alignas(64) float scores[GROUP][SCORES];
    score(q, k, layer.k_slot, count, layer, scores);
    for (int g = 0; g < GROUP; g++) {
        float most = part.most[g];
        for (int t = 0; t < count; t++) most = scores[g][t] > most ? scores[g][t] : most;
        for (int t = count; t < SCORES; t++) scores[g][t] = -INFINITY;
        Floats sum = {};
        for (int t = 0; t < count; t += VL) {
            Floats p = exp_of(load(scores[g] + t) - most);
            for (int i = 0; i < VL; i++) p[i] = t + i < count ? p[i] : 0.0f;
            store(scores[g] + t, p);
            sum += p;
        }
        float total = 0;
        for (int i = 0; i < VL; i++) total += sum[i];
        if (most > part.most[g]) {
            const float factor = std::exp(part.most[g] - most);
            part.sum[g] *= factor;
            for (int d = 0; d < V_ROOM; d++) part.out[g][d] *= factor;
            part.most[g] = most;
        }
        part.sum[g] += total;
    }
    for (int head = 0; head < GROUP; head += HEADS)
        for (int d = 0; d < V_ROOM; d += 4) {
            const int wide = V_ROOM - d < 4 ? V_ROOM - d : 4;
            Floats out[HEADS][4];
            for (int h = 0; h < HEADS; h++)
                for (int i = 0; i < 4; i++) out[h][i] = i < wide ? part.out[head + h][d + i] : Floats{};
            if (wide == 4 && !(V_REST && d + 4 == V_ROOM)) {
                for (int t = 0; t < count; t++) {
                    const Number* token = v + t * layer.v_slot + d * VL;
#pragma GCC unroll 4
                    for (int i = 0; i < 4; i++) {
                        const Floats x = widen(token + i * VL);
#pragma GCC unroll 4
                        for (int h = 0; h < HEADS; h++) out[h][i] += scores[head + h][t] * x;
                    }
                }
            } else {
                for (int t = 0; t < count; t++)
                    for (int i = 0; i < wide; i++) {
                        const Number* token = v + t * layer.v_slot + (d + i) * VL;
                        const bool last = V_REST && d + i + 1 == V_ROOM;
                        const Floats x = last ? rest_of(token, V_REST) : widen(token);
                        for (int h = 0; h < HEADS; h++) out[h][i] += scores[head + h][t] * x;
                    }
            }
            for (int h = 0; h < HEADS; h++)
                for (int i = 0; i < wide; i++) part.out[head + h][d + i] = out[h][i];
        }
}

static void merge(Part& into, const Part& part) {
    for (int g = 0; g < GROUP; g++) {
        const float most = into.most[g] > part.most[g] ? into.most[g] : part.most[g];
        const float a = std::exp(into.most[g] - most), b = std::exp(part.most[g] - most);
        into.most[g] = most;
        into.sum[g] = into.sum[g] * a + part.sum[g] * b;
        for (int d = 0; d < V_ROOM; d++) into.out[g][d] = into.out[g][d] * a + part.out[g][d] * b;
    }
}

static void finish(const Part& part, const float* sinks, Number* out) {
    for (int g = 0; g < GROUP; g++, out += V_DIM) {
        float sum = part.sum[g], factor = 1;
        if (sinks) {
            const float most = sinks[g] > part.most[g] ? sinks[g] : part.most[g];
            factor = std::exp(part.most[g] - most);
            sum = sum * factor + std::exp(sinks[g] - most);
        }
        float row[V_ROOM * VL];
        for (int d = 0; d < V_ROOM; d++) store(row + d * VL, part.out[g][d] * (factor / sum));
        for (int d = 0; d < V_DIM; d++) out[d] = of_float(row[d]);
    }
}

static void begin(const Number* q, int64_t head, Floats (*wide)[K_ROOM], Part& part) {
    for (int g = 0; g < GROUP; g++, q += head) {
        for (int d = 0; d < K_VECTORS; d++) wide[g][d] = widen(q + d * VL);
        if (K_REST) wide[g][K_VECTORS] = rest_of(q + K_VECTORS * VL, K_REST);
        part.most[g] = -INFINITY;
        part.sum[g] = 0;
        for (int d = 0; d < V_ROOM; d++) part.out[g][d] = Floats{};
    }
}

// Where a row's pages begin and end, as its window sees them.
static inline void pages_of(
    const Layer& layer, const Step& step, int64_t row, int64_t& first, int64_t& last) {
    const int64_t length = step.lengths[row];
    const int64_t seen = layer.window && length > layer.window ? length - layer.window : 0;
    first = seen / PAGE;
    last = (length + PAGE - 1) / PAGE;
}

extern "C" {

// q: [rows, heads, K_DIM], k, v: [rows, kv_heads, ...] by the strides of the step; sinks: [heads]
// or null; out: [rows, heads, V_DIM], rows side by side.
void decode(
    const Layer* of, const Step* in, const Number* q, const Number* k, const Number* v,
    const float* sinks, Number* out, int threads) {
    const Layer& layer = *of;
    const Step& step = *in;
    int64_t pages = 0;
    for (int64_t row = 0; row < step.rows; row++) {
        int64_t first, last;
        pages_of(layer, step, row, first, last);
        pages += last - first;
        if (last == first)
            memset(out + row * layer.kv_heads * GROUP * V_DIM, 0,
                   layer.kv_heads * GROUP * V_DIM * sizeof(Number));
    }
    const int64_t work = pages * layer.kv_heads;
    if (work * PAGE * (K_DIM + V_DIM) < FEW) threads = 1;
    const int first_processor = processor();
    std::vector<Part> heads(threads), tails(threads);  // of what a share's start and end cut
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        spread(first_processor);
        const int64_t me = omp_get_thread_num(), all = omp_get_num_threads();
        const int64_t start = work * me / all, stop = work * (me + 1) / all;
        int64_t tail_end = 0, tail_row = 0, tail_head = 0;
        int64_t before = 0;
        for (int64_t row = 0; row < step.rows && before < stop; row++) {
            int64_t first, last;
            pages_of(layer, step, row, first, last);
            const int64_t many = last - first;
            if (before + many * layer.kv_heads <= start) {
                before += many * layer.kv_heads;
                continue;
            }
            for (int64_t head = 0; head < layer.kv_heads; head++, before += many) {
                const int64_t from = start > before ? start - before : 0;
                const int64_t to = stop - before < many ? stop - before : many;
                if (from >= to) continue;
                const int32_t* table = step.table + row * step.table_row;
                const int64_t length = step.lengths[row];
                const int64_t seen =
                    layer.window && length > layer.window ? length - layer.window : 0;
                Number* k_head = layer.k + head * layer.k_head;
                Number* v_head = layer.v + head * layer.v_head;
                if (to == many) {
                    const int64_t entry = table[last - 1], slot = (length - 1) % PAGE;
                    memcpy(k_head + entry * layer.k_entry + slot * layer.k_slot,
                           k + row * step.k_row + head * step.k_head, K_DIM * sizeof(Number));
                    memcpy(v_head + entry * layer.v_entry + slot * layer.v_slot,
                           v + row * step.v_row + head * step.v_head, V_DIM * sizeof(Number));
                }
                Floats wide[GROUP][K_ROOM];
                Part whole;
                Part& part = from ? heads[me] : to < many ? tails[me] : whole;
                begin(q + row * step.q_row + head * GROUP * step.q_head, step.q_head, wide, part);
                for (int64_t page = first + from; page < first + to; page++) {
                    const int64_t entry = table[page];
                    int64_t slot = page * PAGE < seen ? seen - page * PAGE : 0;
                    const int64_t end = length - page * PAGE < PAGE ? length - page * PAGE : PAGE;
                    for (; slot < end; slot += SLICE) {
                        const int count = int(end - slot < SLICE ? end - slot : SLICE);
                        add(wide, k_head + entry * layer.k_entry + slot * layer.k_slot,
                            v_head + entry * layer.v_entry + slot * layer.v_slot, count, layer, part);
                    }
                }
                if (from == 0 && to == many) {
                    const int64_t at = row * layer.kv_heads + head;
                    finish(part, sinks ? sinks + head * GROUP : nullptr, out + at * GROUP * V_DIM);
                } else if (from == 0) {
                    tail_end = before + many, tail_row = row, tail_head = head;
                }
            }
        }
#pragma omp barrier
        if (tail_end) {
            for (int64_t other = me + 1; other < all && work * other / all < tail_end; other++)
                if (work * (other + 1) / all > work * other / all) merge(tails[me], heads[other]);
            const int64_t at = tail_row * layer.kv_heads + tail_head;
            finish(tails[me], sinks ? sinks + tail_head * GROUP : nullptr, out + at * GROUP * V_DIM);
        }
    }
}
}

// Full pages as coded slices: the scale of each group searched for, codes, parameters, checksums.
//
// What is coded lies with one group a lane: K as it is, channels side by side, V turned. The search
// is that of reference/seal.py, the moving of codes that of reference/moves.py, whose MOVES and
// MOVE_BLOCK are constants, too.

#include <algorithm>

#include "native_codes.h"
#include "native_threads.h"

struct Seal {
    const Number *k, *v;
    int64_t k_entry, k_layer, k_head, k_slot, v_entry, v_layer, v_head, v_slot;  // in numbers
    uint8_t* slices;
    int64_t slice_entry, slice_layer;
    const int64_t *src, *dst;
    int64_t pages, layers, heads;
    const int32_t* factors;  // of a checksum, for each word of a slice
    uint64_t* sums;          // [pages, layers, heads]
    float* errors;           // [pages, layers, heads, 2]
    const float* queries;  // [layers, heads, 2, K_DIM], or none
};

static inline Floats least_of(Floats a, Floats b) { return a < b ? a : b; }
static inline Floats most_of(Floats a, Floats b) { return a > b ? a : b; }
static inline Floats size_of(Floats x) { return (Floats)((Ints)x & 0x7fffffff); }
static inline Floats rounded(Floats x) { return x + 12582912.0f - 12582912.0f; }  // below 2^22

// Codes of numbers from `base` on in steps.
static inline Floats code_of(Floats x, Floats base, Floats inverse, float top) {
    const Floats code = (x - base) * inverse, none = {}, all = none + top;
    return rounded(least_of(most_of(code, none), all));
}

// The parameter of the numbers of each lane, and what code 0 and a step are.
template <int FORM>
static inline Ints search(const Floats* x, int count, Floats& base, Floats& step) {
    constexpr float TOP = top_of(FORM), UNIT = (TOP + 1) / 16, FARTHEST = 248;
    const Floats none = {}, huge = none + 65504.0f;
    Floats low = x[0], high = x[0];
    for (int i = 1; i < count; i++) low = least_of(low, x[i]), high = most_of(high, x[i]);
    const Floats wanted = most_of((high - low) / TOP, size_of(low) / (FARTHEST * UNIT));
    const Ints first = scale_above(least_of(wanted, huge));
    Floats best = none + INFINITY;
    Ints found = {};
    for (int tried = 2; tried >= -1; tried--) {
        Ints kept = first + tried;
        kept = kept < 1 ? Ints{} + 1 : kept > 247 ? Ints{} + 247 : kept;
        Floats scale = of_halves(converted<Words>(kept << 7)), from;
        const Floats begin = (low + high - TOP * scale) * 0.5f, far = none + FARTHEST;
        const Floats zero = least_of(most_of(begin / (scale * UNIT), -far), far);
        const Ints param = kept << 8 | zero_near(zero);
        meaning_of<FORM>(converted<Words>(param), scale, from);
        const Floats inverse = 1.0f / scale;
        Floats sums[2] = {};
        for (int i = 0; i < count; i++) {
            const Floats off = from + scale * code_of(x[i], from, inverse, TOP) - x[i];
            sums[i % 2] += off * off;
        }
        const Floats sum = sums[0] + sums[1];
        const Ints better = sum < best;
        best = better ? sum : best;
        base = better ? from : base;
        step = better ? scale : step;
        found = better ? param : found;
    }
    return found;
}

// A token's codes, a byte each, as they are kept.
template <int FORM, int DIM>
static inline void put_codes(const uint8_t* codes, uint8_t* to) {
    if (FORM == INT8) {
        memcpy(to, codes, DIM);
        return;
    }
    constexpr int PART = DIM / 4;
    for (int i = 0; i < PART; i++) {
        const uint16_t word = uint16_t(codes[i] | codes[PART + i] << 4 | codes[2 * PART + i] << 8 |
                                       codes[3 * PART + i] << 12);
        memcpy(to + 2 * i, &word, 2);
    }
}

// Keys as they are coded: codes, a byte each, what is wrong with them, and steps of channels.
struct Coded {
    alignas(64) uint8_t codes[PAGE][K_DIM];
    alignas(64) float errors[PAGE][K_DIM], steps[PAGE / K_PER][K_DIM];
};

// Of VL tokens, a lane each: move that code of `count` channels by a step which lowers the cost of
// all channels so far the most, if any does; `along` is query . error; a channel's weight is K_DIM
// behind its query.
static inline void move_code(
    const float* query, const float* steps, int count, Floats* errors, Floats* codes, Floats& along
) {
    const float* weight = query + K_DIM;
    const Floats none = {}, one = none + 1, all = none + top_of(INT4);
    Floats least = none;
    Ints best = Ints{} - 1;
    for (int d = 0; d < count; d++) {
        if (query[d] == 0) continue;
        const Floats by = along * query[d] > 0 ? none - steps[d] : none + steps[d];
        const Floats across = by * query[d];
        const Floats alone = weight[d] * by * (2 * errors[d] + by);
        const Floats change = across * (2 * along + across) + alone;
        const Ints can = (by > 0 ? codes[d] < all : codes[d] > 0) & (change < least);
        least = can ? change : least;
        best = can ? Ints{} + d : best;
    }
    const Floats before = along;
    for (int d = 0; d < count; d++) {
        const Ints here = best == d, down = before * query[d] > 0;
        const Floats up = here ? (down ? -one : one) : none;
        codes[d] += up;
        errors[d] += up * steps[d];
        along += up * steps[d] * query[d];
    }
}

// Returns the largest error.
static float move_codes(const float* query, Coded& coded) {
    constexpr int QUARTER = K_DIM / 4;
    alignas(64) Floats errors[K_DIM], codes[K_DIM];
    Floats worst = {};
    for (int t = 0; t < PAGE; t += VL) {
        const float* steps = coded.steps[t / K_PER];
        for (int d = 0; d < K_DIM; d += VL) {
            for (int i = 0; i < VL; i++) {
                memcpy(errors + d + i, coded.errors[t + i] + d, sizeof(Floats));
                const Bytes bytes = load_bytes(coded.codes[t + i] + d);
                codes[d + i] = converted<Floats>(converted<Ints>(bytes));
            }
            transpose(errors + d);
            transpose(codes + d);
        }
        Floats along = {};
        for (int start = 0; start < QUARTER; start += MOVE_BLOCK)
            for (int first = start; first < K_DIM; first += QUARTER) {
                const int count = std::min(MOVE_BLOCK, QUARTER - start);
                for (int d = first; d < first + count; d++) along += query[d] * errors[d];
                for (int i = 0; i < MOVES; i++)
                    move_code(query + first, steps + first, count, errors + first, codes + first,
                              along);
            }
        for (int d = 0; d < K_DIM; d += VL) {
            for (int i = 0; i < VL; i++) worst = most_of(worst, size_of(errors[d + i]));
            transpose(codes + d);
            for (int i = 0; i < VL; i++) {
                const Bytes bytes = converted<Bytes>(converted<Ints>(codes[d + i]));
                memcpy(coded.codes[t + i] + d, &bytes, sizeof bytes);
            }
        }
    }
    return greatest(worst);
}

// Returns the largest error.
static float seal_k(const Number* k, int64_t slot, const float* query, uint8_t* head) {
    alignas(64) Floats x[PAGE];
    Coded coded;
    Floats most = {};
    for (int d = 0; d < K_DIM; d += VL) {
        for (int t = 0; t < PAGE; t++) x[t] = widen(k + t * slot + d);
        for (int t = 0; t < PAGE; t += K_PER) {
            Floats base = {}, step = {};
            const Words param = converted<Words>(search<K_FORM>(x + t, K_PER, base, step));
            memcpy(head + K_PARAMS + 2 * (t / K_PER * K_DIM + d), &param, sizeof param);
            memcpy(coded.steps[t / K_PER] + d, &step, sizeof step);
            const Floats inverse = 1.0f / step;
            for (int i = t; i < t + K_PER; i++) {
                const Floats code = code_of(x[i], base, inverse, top_of(K_FORM));
                const Floats error = base + step * code - x[i];
                most = most_of(most, size_of(error));
                if (query) memcpy(coded.errors[i] + d, &error, sizeof error);
                const Bytes bytes = converted<Bytes>(converted<Ints>(code));
                memcpy(coded.codes[i] + d, &bytes, sizeof bytes);
            }
        }
    }
    const float worst = query ? move_codes(query, coded) : greatest(most);
    for (int t = 0; t < PAGE; t++) put_codes<K_FORM, K_DIM>(coded.codes[t], head + t * K_BYTES);
    return worst;
}

static float seal_v(const Number* v, int64_t slot, uint8_t* head) {
    constexpr int GROUPS = V_GROUPS ? V_GROUPS : 1;
    alignas(64) Floats x[V_PER];
    alignas(64) uint8_t codes[V_DIM];
    Floats base[GROUPS] = {}, step[GROUPS] = {}, worst = {};
    for (int t = 0; t < PAGE; t += VL) {
        for (int g = 0; g < GROUPS; g++) {
            for (int d = 0; d < V_PER; d += VL) {
                for (int i = 0; i < VL; i++) x[d + i] = widen(v + (t + i) * slot + g * V_PER + d);
                transpose(x + d);
            }
            const Words param = converted<Words>(search<V_FORM>(x, V_PER, base[g], step[g]));
            memcpy(head + V_PARAMS + 2 * (g * PAGE + t), &param, sizeof param);
        }
        for (int i = 0; i < VL; i++) {
            for (int d = 0; d < V_DIM; d += VL) {
                const Floats from = Floats{} + base[d / V_PER][i];
                const Floats scale = Floats{} + step[d / V_PER][i];
                const Floats given = widen(v + (t + i) * slot + d);
                const Floats code = code_of(given, from, 1.0f / scale, top_of(V_FORM));
                worst = most_of(worst, size_of(from + scale * code - given));
                const Bytes bytes = converted<Bytes>(converted<Ints>(code));
                memcpy(codes + d, &bytes, sizeof bytes);
            }
            put_codes<V_FORM, V_DIM>(codes, head + V_CODES + (t + i) * V_BYTES);
        }
    }
    return greatest(worst);
}

static void put_fp8(uint8_t* to, Floats x, Floats middle, Floats& worst) {
    const Bytes codes = to_fp8(x - middle);
    memcpy(to, &codes, sizeof codes);
    worst = most_of(worst, size_of(of_fp8(codes) + middle - x));
}

// Of keys, what is left beside the middle of a channel.
static float seal_fp8_k(const Number* k, int64_t slot, uint8_t* head) {
    const Floats most = Floats{} + 65504.0f;
    Floats worst = {};
    for (int d = 0; d < K_DIM; d += VL) {
        Floats low = widen(k + d), high = low;
        for (int t = 1; t < PAGE; t++) {
            const Floats x = widen(k + t * slot + d);
            low = least_of(low, x), high = most_of(high, x);
        }
        const Words middle = to_halves(most_of(least_of((low + high) * 0.5f, most), -most));
        memcpy(head + K_PARAMS + 2 * d, &middle, sizeof middle);
        for (int t = 0; t < PAGE; t++)
            put_fp8(head + t * K_BYTES + d, widen(k + t * slot + d), of_halves(middle), worst);
    }
    return greatest(worst);
}

static float seal_fp8_v(const Number* v, int64_t slot, uint8_t* to) {
    Floats worst = {};
    for (int t = 0; t < PAGE; t++, v += slot, to += V_BYTES)
        for (int d = 0; d < V_DIM; d += VL) put_fp8(to + d, widen(v + d), Floats{}, worst);
    return greatest(worst);
}

static float copy_tokens(const Number* from, int64_t slot, int dim, uint8_t* to) {
    for (int t = 0; t < PAGE; t++, from += slot, to += dim * sizeof(Number))
        memcpy(to, from, dim * sizeof(Number));
    return 0;
}

static void seal_head(const Seal& seal, int64_t unit) {
    const int64_t head = unit % seal.heads, layer = unit / seal.heads % seal.layers;
    const int64_t page = unit / seal.heads / seal.layers, entry = seal.src[page];
    const Number* k =
        seal.k + entry * seal.k_entry + layer * seal.k_layer + head * seal.k_head;
    const Number* v =
        seal.v + entry * seal.v_entry + layer * seal.v_layer + head * seal.v_head;
    uint8_t* to = seal.slices + seal.dst[page] * seal.slice_entry + layer * seal.slice_layer;
    to += head * HEAD;
    float* errors = seal.errors + 2 * unit;
    const float* query = seal.queries;
    if (query) query += (layer * seal.heads + head) * 2 * K_DIM;
    errors[0] = K_WHOLE         ? seal_k(k, seal.k_slot, query, to)
                : K_FORM == FP8 ? seal_fp8_k(k, seal.k_slot, to)
                                : copy_tokens(k, seal.k_slot, K_DIM, to);
    errors[1] = V_WHOLE         ? seal_v(v, seal.v_slot, to)
                : V_FORM == FP8 ? seal_fp8_v(v, seal.v_slot, to + V_CODES)
                                : copy_tokens(v, seal.v_slot, V_DIM, to + V_CODES);
    memset(to + HEAD_END, 0, HEAD - HEAD_END);
    const int32_t* factors = seal.factors + head * (HEAD / 4);
    uint64_t sum = 0;
    for (int i = 0; i < HEAD / 4; i++) {
        int32_t word;
        memcpy(&word, to + 4 * i, 4);
        sum += uint64_t(int64_t(word) * factors[i]);
    }
    seal.sums[unit] = sum;
}

extern "C" void seal_pages(const Seal* seal, int threads) {
    const int64_t units = seal->pages * seal->layers * seal->heads;
    const int first_processor = processor();
    threads = int(std::max<int64_t>(std::min<int64_t>(threads, units / 2), 1));
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        spread(first_processor);
#pragma omp for schedule(dynamic)
        for (int64_t unit = 0; unit < units; unit++) seal_head(*seal, unit);
    }
}

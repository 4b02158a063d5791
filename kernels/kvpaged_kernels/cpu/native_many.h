// Many queries of a KV head over a run of positions, block after block: scores = Q K^T, weights =
// e^(scores - most), out = out e^(old most - most) + weights V. The softmax goes along with the
// blocks (Milakov and Gimelshein 2018; FlashAttention, Dao et al. 2022).
//
// A line is one head of one token. K is turned, so that a vector holds a step of VL tokens; V lies
// as it did, a step of tokens a vector. Both stay in a cache while all lines meet them, MT lines
// and NV vectors at a time, whose sums stay in registers (native_block.h).

#pragma once

#include "native_block.h"

// `M` lines from `line` on over a block: their scores, or what its values add.
template <int M>
struct Lines {
    static void score(Room& room, int line, int count) {
        for (int t = 0; t < count; t += WIDE)
            score_lines<M>(
                room.q + line * K_UNITS, room.k + t * K_UNITS, room.scores + line * BLOCK + t);
    }
    static void add(Room& room, int line, int count) {
        const Unit* weights = room.weights_of(line);
        const float* factor = room.factor + line;
        float* out = room.out + line * V_WIDTH;
        int d = 0;
        for (; d + NV <= V_ROOM; d += NV)
            add_lines<M, NV>(weights, room.v + d * VL, count, factor, out + d * VL);
        for (; d < V_ROOM; d++)
            add_lines<M, 1>(weights, room.v + d * VL, count, factor, out + d * VL);
    }
};

static void score_any(Room& room, int m, int line, int count) {
    switch (m) {
        case 1: return Lines<1>::score(room, line, count);
        case 2: return Lines<2>::score(room, line, count);
        case 3: return Lines<3>::score(room, line, count);
        case 4: return Lines<4>::score(room, line, count);
        case 5: return Lines<5>::score(room, line, count);
        case 6: return Lines<6>::score(room, line, count);
    }
}

static void add_any(Room& room, int m, int line, int count) {
    switch (m) {
        case 1: return Lines<1>::add(room, line, count);
        case 2: return Lines<2>::add(room, line, count);
        case 3: return Lines<3>::add(room, line, count);
        case 4: return Lines<4>::add(room, line, count);
        case 5: return Lines<5>::add(room, line, count);
        case 6: return Lines<6>::add(room, line, count);
    }
}

// Scores of a line as weights; tokens [low, high) of a block of `count` are seen.
static inline void weigh(const Layer& layer, Room& room, int line, int low, int high, int count) {
    float* scores = room.scores + line * BLOCK;
    const int end = (count + VL - 1) / VL * VL;
    if (low >= high) {
        room.factor[line] = 1;
        memset(room.weights_of(line), 0, end / STEP * sizeof(Unit));
        return;
    }
    if (STEP == 2)  // queries are as they were given
        for (int t = 0; t < end; t += VL) store(scores + t, load(scores + t) * layer.scale);
    if (layer.softcap)
        for (int t = 0; t < end; t += VL)
            store(scores + t, capped(load(scores + t), layer.softcap));
    for (int t = 0; t < low; t++) scores[t] = -INFINITY;
    for (int t = high; t < end; t++) scores[t] = -INFINITY;
    Floats most = load(scores);
    for (int t = VL; t < end; t += VL) {
        const Floats x = load(scores + t);
        most = x > most ? x : most;
    }
    const float here = greatest(most), top = here > room.most[line] ? here : room.most[line];
    const float base = base_of(top);
    const Floats none = {};
    Floats sum = {};
    for (int t = 0; t < end; t += VL) {
        const Floats x = load(scores + t);
        const Floats weight = x == -INFINITY ? none : exp_of(x - base);
        store_weights(room.weights_of(line), t, weight);
        sum += weight;
    }
    const float factor = top == room.most[line] ? 1 : std::exp(room.most[line] - base);
    room.factor[line] = factor;
    room.sum[line] = room.sum[line] * factor + total_of(sum);
    room.most[line] = top;
}

// The lines of `tokens` tokens over a block of `count` that lies in `room`; `shown(i)` is the range
// of them that token i sees.
template <class Shown>
static void attend_block(const Layer& layer, int tokens, int count, Room& room, Shown shown) {
    const int lines = tokens * GROUP, tiles = (lines + MT - 1) / MT;
    for (int t = 0; t < tiles; t++) {
        const int line = lines * t / tiles;
        score_any(room, lines * (t + 1) / tiles - line, line, count);
    }
    for (int i = 0; i < tokens; i++) {
        int64_t low, high;
        shown(i, low, high);
        low = low < 0 ? 0 : low > count ? count : low;
        high = high > count ? count : high < low ? low : high;
        for (int g = 0; g < GROUP; g++)
            weigh(layer, room, i * GROUP + g, int(low), int(high), count);
    }
    for (int t = 0; t < tiles; t++) {
        const int line = lines * t / tiles;
        add_any(room, lines * (t + 1) / tiles - line, line, count);
    }
}

// Positions [first, last) of `pages` into the lines of `tokens` tokens in `room`. Token i is at
// position `position + i` and sees what is up to there, as far as the window goes; `position` of
// `last` or more: all.
static void attend_run(
    const Layer& layer, const int32_t* pages, int64_t head, int64_t first, int64_t last,
    int tokens, int64_t position, Room& room) {
    for (int64_t at = first; at < last; at += BLOCK) {
        const int count = int(last - at < BLOCK ? last - at : BLOCK);
        gather(layer, pages, head, at, count, room);
        attend_block(layer, tokens, count, room, [&](int i, int64_t& low, int64_t& high) {
            const int64_t own = position + i;
            low = layer.window && position < last ? own - layer.window + 1 - at : 0;
            high = own + 1 - at;
        });
    }
}

// The queries of a token as line i's of `room`, `q_head` apart, and nothing seen.
static void begin_token(const Number* q, int64_t q_head, float scale, int i, Room& room) {
    for (int g = 0; g < GROUP; g++, q += q_head) {
        const int line = i * GROUP + g;
        set_query(room.q + line * K_UNITS, q, scale);
        room.most[line] = -INFINITY;
        room.sum[line] = 0;
        memset(room.out + line * V_WIDTH, 0, V_WIDTH * sizeof(float));
    }
}

// Queries of token `i` of `room`, as floats times the scale, and nothing seen.
static void begin_lines(const Call& call, int64_t token, int64_t head, int i, Room& room) {
    begin_token(call.query(token, head), call.step.q_head, call.layer.scale, i, room);
}

// The lines of token `i`, and back.
static void get_part(const Room& room, int i, Part& part) {
    memcpy(part.most, room.most + i * GROUP, sizeof part.most);
    memcpy(part.sum, room.sum + i * GROUP, sizeof part.sum);
    memcpy(part.out, room.out + i * GROUP * V_WIDTH, sizeof part.out);
}
static void set_part(const Part& part, int i, Room& room) {
    memcpy(room.most + i * GROUP, part.most, sizeof part.most);
    memcpy(room.sum + i * GROUP, part.sum, sizeof part.sum);
    memcpy(room.out + i * GROUP * V_WIDTH, part.out, sizeof part.out);
}

// Many new tokens over their pages, block after block (native_many.h): each over the sealed form of
// the pages before its own, and its own as it is.

#pragma once

#include "native_many.h"
#include "native_sealed.h"

// What is told to Python, by number (`_WRONG`, native_sealed.py).
enum What : int64_t { FINE, LENGTH, ENTRY, NEW, OWN };

struct Told {
    int64_t what, row, a, b, entries;
};

static Told check_pages(
    const Pages& pages, const int32_t* entries, int64_t row, int64_t first, int64_t place,
    int64_t stop) {
    for (int64_t page = first; page < stop; page++) {
        const bool sealed = page >= pages.keep && page < place;
        const int64_t all = sealed ? pages.sealed_entries : pages.layer.entries;
        if (uint32_t(entries[page]) >= uint64_t(all)) return {ENTRY, row, page, entries[page], all};
    }
    return {FINE};
}

// What a call is given. Row i's new tokens, its last, have the queries [cu_q[i], cu_q[i + 1]), and
// lie in the own pages [cu_own[i], cu_own[i + 1]).
struct Prefill {
    Pages pages;
    Layer own;  // its pages are own ones
    const int32_t *table, *lengths, *cu_q, *cu_own;
    int64_t table_row, width, rows;
    const Number* q;
    int64_t q_row, q_head;
    const float* sinks;  // or null
    Number* out;         // [tokens, heads, V_DIM]

    const int32_t* entries(int64_t row) const { return table + row * table_row; }
    int64_t tokens(int64_t row) const { return int64_t(cu_q[row + 1]) - cu_q[row]; }
    int64_t start(int64_t row) const { return lengths[row] - tokens(row); }
};

static Told check_prefill(const Prefill& call, int64_t tokens, int64_t own) {
    int64_t q = 0, pages = 0;
    for (int64_t row = 0; row < call.rows; row++) {
        const int64_t many = call.tokens(row), length = call.lengths[row];
        if (call.cu_q[row] != q || many < 0 || many > length || q + many > tokens)
            return {NEW, row, many, length, tokens};
        q += many;
        const int64_t place = (length - 1) / PAGE, first = call.start(row) / PAGE;
        const int64_t wanted = many ? place + 1 - first : 0;
        const int64_t given = int64_t(call.cu_own[row + 1]) - call.cu_own[row];
        if (call.cu_own[row] != pages || given != wanted || pages + given > own)
            return {OWN, row, given, wanted, own};
        pages += given;
        if (!many) continue;
        if (place > call.width) return {LENGTH, row, length, call.width};
        const int64_t seen = call.pages.layer.first_seen(call.start(row)) / PAGE;
        const Told told =
            check_pages(call.pages, call.entries(row), row, seen, place, place);
        if (told.what) return told;
    }
    if (q != tokens) return {NEW, call.rows, 0, q, tokens};
    return {FINE};
}

// Queries of a block, from positions that AT_ONCE divides on: where pages are as long, all of one.
constexpr int at_once(int most) { return most < 2 ? 1 : 2 * at_once(most / 2); }
constexpr int AT_ONCE = at_once(TOKENS);

struct Block {
    int32_t row, head;
    int64_t position;  // of the first query
    int count;
};

static void make_blocks(const Prefill& call, std::vector<Block>& to) {
    for (int64_t row = 0; row < call.rows; row++) {
        const int64_t start = call.start(row);
        for (int64_t stop = call.lengths[row]; stop > start;) {  // the longest first
            const int64_t begin = std::max((stop - 1) / AT_ONCE * AT_ONCE, start);
            for (int64_t head = 0; head < call.pages.layer.kv_heads; head++)
                to.push_back({int32_t(row), int32_t(head), begin, int(stop - begin)});
            stop = begin;
        }
    }
}

// What is unpacked of a block.
struct Unpacked {
    alignas(64) Number k[BLOCK * K_DIM], v[BLOCK * V_DIM];
};

// Tokens of whole pages from position `at` on, `count` of them, both multiples of 16, into `room`.
static void fill_before(
    const Prefill& call, const int32_t* entries, int64_t head, int64_t at, int count,
    Unpacked& unpacked, Room& room) {
    const Pages& pages = call.pages;
    Tokens tokens;
    for (int t = 0; t < count;) {
        const int64_t page = (at + t) / PAGE, entry = entries[page];
        const int slot = int((at + t) % PAGE), some = std::min(PAGE - slot, count - t);
        Number *k = unpacked.k + t * K_DIM, *v = unpacked.v + t * V_DIM;
        const bool sealed = page >= pages.keep;
        if (sealed) {
            unpack_k(pages.head_of(entry, head), slot, some, k);
            unpack_v(pages.head_of(entry, head), slot, some, v);
        }
        for (int i = 0; i < some; i++) {
            const int64_t place = slot + i;
            tokens.keys[t + i] = sealed ? k + i * K_DIM : pages.layer.key(entry, head, place);
            tokens.values[t + i] = sealed ? v + i * V_DIM : pages.layer.value(entry, head, place);
        }
        t += some;
    }
    tokens.values[count] = nullptr;
    fill(tokens, count, room);
}

static void run_block(const Prefill& call, const Block& block, Room& room) {
    const Layer& layer = call.pages.layer;
    const int64_t start = call.start(block.row), position = block.position;
    const int64_t token = call.cu_q[block.row] + position - start;
    const int64_t stop = position + block.count, first = position / PAGE * PAGE;
    const int64_t last = (stop - 1) / PAGE * PAGE, seen = layer.first_seen(position);
    const Number* q = call.q + token * call.q_row + block.head * GROUP * call.q_head;
    for (int i = 0; i < block.count; i++)
        begin_token(q + i * call.q_row, call.q_head, layer.scale, i, room);
    Unpacked unpacked;
    for (int64_t at = seen / 16 * 16; at < last; at += BLOCK) {
        const int count = int(std::min<int64_t>(last - at, BLOCK));
        fill_before(call, call.entries(block.row), block.head, at, count, unpacked, room);
        attend_block(layer, block.count, count, room, [&](int i, int64_t& low, int64_t& high) {
            low = layer.first_seen(position + i) - at;
            high = (position + i) / PAGE * PAGE - at;
        });
    }
    // Own pages, one after another.
    for (int64_t at = first; at < stop; at += BLOCK) {
        const int count = int(std::min<int64_t>(stop - at, BLOCK));
        Tokens tokens;
        for (int t = 0; t < count; t++) {
            const int64_t page = call.cu_own[block.row] + (at + t) / PAGE - start / PAGE;
            tokens.keys[t] = call.own.key(page, block.head, (at + t) % PAGE);
            tokens.values[t] = call.own.value(page, block.head, (at + t) % PAGE);
        }
        tokens.values[count] = nullptr;
        fill(tokens, count, room);
        attend_block(layer, block.count, count, room, [&](int i, int64_t& low, int64_t& high) {
            const int64_t own = position + i;
            low = std::max(layer.first_seen(own), own / PAGE * PAGE) - at;
            high = own + 1 - at;
        });
    }
    Part part;
    for (int i = 0; i < block.count; i++) {
        get_part(room, i, part);
        finish(part, call.sinks ? call.sinks + block.head * GROUP : nullptr,
               call.out + ((token + i) * layer.kv_heads + block.head) * GROUP * V_DIM);
    }
}

// Attention over pages of which some are sealed.

#include <algorithm>
#include <atomic>
#include <new>
#include <vector>

#include "native_sealed_few.h"
#include "native_sealed_many.h"
#include "native_threads.h"

// What a call is given. Row i's last token has the query q + i * q_row, its heads q_head apart.
struct Decode {
    Pages pages;
    const int32_t *table, *lengths;
    int64_t table_row, width, rows;
    const Number* q;
    int64_t q_row, q_head;
    const float* sinks;  // or null
    Number* out;         // [rows, heads, V_DIM]

    const int32_t* entries(int64_t row) const { return table + row * table_row; }
    int64_t place(int64_t row) const { return (lengths[row] - 1) / PAGE; }
    int64_t first(int64_t row) const {
        return pages.layer.first_seen(lengths[row] - 1) / PAGE;
    }
    int64_t many(int64_t row) const { return lengths[row] ? place(row) + 1 - first(row) : 0; }
    const float* sinks_of(int64_t head) const { return sinks ? sinks + head * GROUP : nullptr; }
    Number* output(int64_t row, int64_t head) const {
        return out + (row * pages.layer.kv_heads + head) * GROUP * V_DIM;
    }
};

// A thread's share. All rows' pages, a KV head after the other, are one line of work, cut wherever
// that falls; where it cuts a row's head, the first piece waits in `tails`, the others in `heads`.
struct Share {
    const Decode& call;
    const Layer& inner;
    int64_t work, me, all;
    std::vector<Part>&heads, &tails;
    int64_t tail_end = 0, tail_row = 0, tail_head = 0;

    void run() {
        const int64_t start = work * me / all, stop = work * (me + 1) / all;
        int64_t before = 0;
        for (int64_t row = 0; row < call.rows && before < stop; row++) {
            const int64_t many = call.many(row);
            for (int64_t head = 0; head < call.pages.layer.kv_heads; head++, before += many) {
                const int64_t from = std::max<int64_t>(start - before, 0);
                const int64_t to = std::min(stop - before, many);
                if (from < to) piece(row, head, many, from, to, before);
            }
        }
    }

    // Pages [from, to) of the `many` that a row sees.
    void piece(
        int64_t row, int64_t head, int64_t many, int64_t from, int64_t to, int64_t before) {
        FewQueries q;
        prepare_queries(call.q + row * call.q_row + head * GROUP * call.q_head, call.q_head, q);
        Part whole;
        Part& part = from ? heads[me] : to < many ? tails[me] : whole;
        clear(part);
        const int64_t first = call.first(row);
        for (int64_t page = first + from; page < first + to; page++)
            add_page(q, row, head, page, page + 1 < first + to, part);
        if (from == 0 && to == many)
            finish(part, call.sinks_of(head), call.output(row, head));
        else if (from == 0)
            tail_end = before + many, tail_row = row, tail_head = head;
    }

    bool is_sealed(int64_t row, int64_t page) const {
        return page >= call.pages.keep && page < call.place(row);
    }

    // `more`: the next page will be wanted, too.
    void add_page(
        const FewQueries& q, int64_t row, int64_t head, int64_t page, bool more, Part& part) {
        const Layer& layer = call.pages.layer;
        const int64_t length = call.lengths[row];
        const int64_t seen = layer.first_seen(length - 1) - page * PAGE;
        const int32_t* entries = call.entries(row);
        if (is_sealed(row, page)) {
            const uint8_t* codes = call.pages.head_of(entries[page], head);
            const uint8_t* then = nullptr;
            if (more && is_sealed(row, page + 1))
                then = call.pages.head_of(entries[page + 1], head);
            for (int slot = 0; slot < PAGE; slot += SLICE) {
                if (seen >= slot + SLICE) continue;
                const uint8_t* next = slot + SLICE < PAGE ? codes + (slot + SLICE) * K_BYTES : then;
                add_slice(q, codes, slot, seen > slot ? int(seen - slot) : 0, inner, next, part);
            }
            return;
        }
        const int64_t end = std::min<int64_t>(length - page * PAGE, PAGE);
        for (int64_t slot = seen > 0 ? seen : 0; slot < end; slot += SLICE)
            add(q.plain, layer.key(entries[page], head, slot),
                layer.value(entries[page], head, slot), int(std::min<int64_t>(end - slot, SLICE)),
                layer, nullptr, part);
    }

    // Put together what shares have cut; all have run.
    void end() {
        if (!tail_end) return;
        for (int64_t other = me + 1; other < all && work * other / all < tail_end; other++)
            if (work * (other + 1) / all > work * other / all) merge(tails[me], heads[other]);
        finish(tails[me], call.sinks_of(tail_head), call.output(tail_row, tail_head));
    }
};

static void run(const Decode& call, int64_t work, std::vector<Part>& heads,
                std::vector<Part>& tails) {
    Layer inner = call.pages.layer;
    inner.k_slot = K_DIM, inner.v_slot = V_DIM;
    const int threads = int(heads.size()), first_processor = processor();
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        spread(first_processor);
        Share share{call, inner, work, omp_get_thread_num(), omp_get_num_threads(), heads, tails};
        share.run();
#pragma omp barrier
        share.end();
    }
}

extern "C" {

// Returns 0, or how many bytes of memory there weren't: nothing has been done, as where `told` says
// what is wrong.
int64_t mixed_decode(const Decode* call, int threads, Told* told) {
    int64_t work = 0;
    for (int64_t row = 0; row < call->rows; row++) {
        const int64_t length = call->lengths[row];
        if (length < 0 || length > call->width * PAGE) {
            *told = {LENGTH, row, length, call->width};
            return 0;
        }
        if (!length) {
            memset(call->output(row, 0), 0,
                   call->pages.layer.kv_heads * GROUP * V_DIM * sizeof(Number));
            continue;
        }
        const int64_t place = call->place(row);
        *told = check_pages(
            call->pages, call->entries(row), row, call->first(row), place, place + 1);
        if (told->what) return 0;
        work += call->many(row) * call->pages.layer.kv_heads;
    }
    *told = {FINE};
    if (work * PAGE * (K_DIM + V_DIM) < 1 << 16) threads = 1;  // not worth a second
    std::vector<Part> heads, tails;
    try {
        heads.resize(threads);
        tails.resize(threads);
    } catch (const std::bad_alloc&) {
        return threads * int64_t(2 * sizeof(Part));
    }
    run(*call, work, heads, tails);
    return 0;
}

// As `mixed_decode`. `tokens`: new ones; `own`: their pages.
int64_t mixed_prefill(
    const Prefill* call, int64_t tokens, int64_t own, int threads, Told* told) {
    *told = check_prefill(*call, tokens, own);
    if (told->what) return 0;
    const Rooms* rooms = nullptr;
    std::vector<Block> blocks;
    try {
        make_blocks(*call, blocks);
        threads = int(std::max<int64_t>(std::min<int64_t>(threads, blocks.size()), 1));
        rooms = &rooms_for(threads);
    } catch (const std::bad_alloc&) {
        return threads * int64_t(sizeof(Room));
    }
    const int first_processor = processor();
    std::atomic<size_t> next{0};
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        spread(first_processor);
        for (size_t i; (i = next++) < blocks.size();)
            run_block(*call, blocks[i], *(*rooms)[omp_get_thread_num()]);
    }
    return 0;
}
}

// Who computes what in a step, once for all layers of a group.
//
// Rows of one new token are read as they lie (native_few.h), cut into equal shares. Rows of more,
// and pages that several rows share, are tasks of many queries (native_many.h), taken by whoever is
// free.
//
// Rows that begin with the same pages form a tree of trunks:
//
//     |------ trunk of a, b, c ------|--- trunk of b, c ---|-- b's own
//                                    |-- a's own           |-- c's own
//
// A trunk's tasks give each of its queries a part, which goes into the query's own sum. Rows under
// a window, which each sees from elsewhere on, and rows of so many new tokens that they are worth
// turning K by themselves, stand in none. A row that has few new tokens, a long past and nobody
// beside it stands in one alone: a trunk can be cut into tasks, its own part is one.

#pragma once

#include <algorithm>
#include <vector>

#include "native_many.h"

constexpr int64_t SHORTEST = (64 + PAGE - 1) / PAGE;  // pages of a trunk, at least
constexpr int64_t LONG = (512 + PAGE - 1) / PAGE;     // pages of a part that is worth a task
constexpr int64_t MOST_TOKENS = TOKENS / 2 > 1 ? TOKENS / 2 : 1;  // of a row in a trunk

struct Trunk {
    const int32_t* pages;      // of one of its rows
    int64_t first, last;       // of those
    int64_t tokens_at, tokens;  // in Plan::trunk_tokens
    int64_t parts_at, parts;    // in Plan::parts: [parts][kv_heads][tokens]; cut into so many
};

struct Link {
    int32_t trunk, at, next;  // a row's first token is the trunk's `at`-th
};

struct Task {
    int32_t of, head, first, count, part;  // a row or a trunk; tokens of it; part of a trunk
};

struct Plan {
    Step step;
    int threads;
    bool small;  // not worth a second thread
    std::vector<int32_t> singles, several;  // rows of one new token, of more
    std::vector<int64_t> own;               // by row: pages in trunks
    std::vector<int32_t> links;             // by row: its first link, or -1
    std::vector<Link> all_links;
    std::vector<Trunk> trunks;
    std::vector<int32_t> trunk_tokens;
    std::vector<Part> parts;
    std::vector<Task> trunk_tasks, tasks;
    int64_t single_pages;  // of all single rows, one head
    int64_t wanted;        // bytes, at the least
};

struct Planner {
    Plan& plan;
    const Layer& layer;
    std::vector<int32_t> rows;   // that may stand in trunks, by their pages
    std::vector<int64_t> whole;  // by row: pages that all its queries see whole

    int64_t alike(int32_t a, int32_t b, int64_t from) const {
        const int32_t *x = plan.step.pages(a), *y = plan.step.pages(b);
        const int64_t most = std::min(whole[a], whole[b]);
        while (from < most && x[from] == y[from]) from++;
        return from;
    }

    void add(int64_t low, int64_t high, int64_t first, int64_t last) {
        const int32_t number = int32_t(plan.trunks.size());
        Trunk trunk{plan.step.pages(rows[low]), first, last, int64_t(plan.trunk_tokens.size()), 0,
                    0, 1};
        for (int64_t i = low; i < high; i++) {
            const int32_t row = rows[i];
            plan.all_links.push_back({number, int32_t(trunk.tokens), plan.links[row]});
            plan.links[row] = int32_t(plan.all_links.size()) - 1;
            plan.own[row] = last;
            trunk.tokens += plan.step.tokens(row);
            for (int32_t t = plan.step.cu_q[row]; t < plan.step.cu_q[row + 1]; t++)
                plan.trunk_tokens.push_back(t);
        }
        const int64_t tasks = layer.kv_heads * ((trunk.tokens + TOKENS - 1) / TOKENS);
        const int64_t wanted = (4 * plan.threads + tasks - 1) / tasks;
        trunk.parts = std::max<int64_t>(1, std::min(wanted, (last - first) / LONG));
        plan.trunks.push_back(trunk);
    }

    // Rows [low, high) have the pages before `first` in trunks.
    void part(int64_t low, int64_t high, int64_t first) {
        const int64_t same = alike(rows[low], rows[high - 1], first);  // sorted: of all of them
        if (same - first >= SHORTEST) {
            add(low, high, first, same);
            first = same;
        }
        for (int64_t start = low; start < high;) {
            int64_t stop = start + 1;
            while (stop < high && alike(rows[start], rows[stop], same) > same) stop++;
            if (stop - start > 1) part(start, stop, first);
            start = stop;
        }
    }

    void find_trunks() {
        if (layer.window) return;
        const Step& step = plan.step;
        whole.resize(step.rows);
        for (int64_t row = 0; row < step.rows; row++) {
            const int64_t tokens = step.tokens(row);
            whole[row] = (step.lengths[row] - tokens) / PAGE;
            if (tokens && tokens <= MOST_TOKENS && whole[row] >= SHORTEST)
                rows.push_back(int32_t(row));
        }
        if (rows.size() < 2) return;
        std::sort(rows.begin(), rows.end(), [&](int32_t a, int32_t b) {
            const int64_t same = alike(a, b, 0);
            const bool a_ends = same == whole[a], b_ends = same == whole[b];
            if (a_ends || b_ends) return a_ends && (!b_ends || a < b);
            return step.pages(a)[same] < step.pages(b)[same];
        });
        part(0, int64_t(rows.size()), 0);
    }

    // Rows of a few tokens whose past is one long task: cut.
    void cut_lonely() {
        if (layer.window) return;
        if (int64_t(plan.several.size()) * layer.kv_heads >= 4 * plan.threads) return;
        rows.resize(1);
        for (const int32_t row : plan.several)
            if (plan.step.tokens(row) <= TOKENS && whole[row] - plan.own[row] >= 2 * LONG) {
                rows[0] = row;
                add(0, 1, plan.own[row], whole[row]);
            }
    }
};

static inline int64_t first_page(const Plan& plan, const Layer& layer, int64_t row, int64_t query) {
    return std::max(layer.first_seen(query) / PAGE, plan.own[row]);
}

static inline int64_t last_page(const Step& step, int64_t row) {
    return (step.lengths[row] + PAGE - 1) / PAGE;
}

static void make_plan(const Layer& layer, Plan& plan) {
    const Step& step = plan.step;
    plan.own.assign(step.rows, 0);
    plan.links.assign(step.rows, -1);
    for (int64_t row = 0; row < step.rows; row++)
        if (step.tokens(row))
            (step.tokens(row) == 1 ? plan.singles : plan.several).push_back(int32_t(row));
    Planner planner{plan, layer, {}, {}};
    planner.find_trunks();
    planner.cut_lonely();
    int64_t parts = 0, work = 0;
    for (size_t i = 0; i < plan.trunks.size(); i++) {
        Trunk& trunk = plan.trunks[i];
        trunk.parts_at = parts;
        parts += trunk.parts * layer.kv_heads * trunk.tokens;
        work += (trunk.last - trunk.first) * trunk.tokens;
        for (int64_t part = 0; part < trunk.parts; part++)
            for (int64_t head = 0; head < layer.kv_heads; head++)
                for (int64_t first = 0; first < trunk.tokens; first += TOKENS)
                    plan.trunk_tasks.push_back(
                        {int32_t(i), int32_t(head), int32_t(first),
                         int32_t(std::min<int64_t>(TOKENS, trunk.tokens - first)), int32_t(part)});
    }
    plan.wanted = parts * int64_t(sizeof(Part));
    plan.parts.resize(parts);
    plan.single_pages = 0;
    for (const int32_t row : plan.singles)
        plan.single_pages +=
            last_page(step, row) - first_page(plan, layer, row, step.lengths[row] - 1);
    work += plan.single_pages;
    for (const int32_t row : plan.several) {
        const int64_t tokens = step.tokens(row), blocks = (tokens + TOKENS - 1) / TOKENS;
        work += tokens * (last_page(step, row) - plan.own[row]);
        for (int64_t block = blocks - 1; block >= 0; block--)  // the longest first
            for (int64_t head = 0; head < layer.kv_heads; head++)
                plan.tasks.push_back(
                    {row, int32_t(head), int32_t(block * TOKENS),
                     int32_t(std::min<int64_t>(TOKENS, tokens - block * TOKENS)), 0});
    }
    plan.small = work * layer.kv_heads * PAGE * (K_DIM + V_DIM) < 1 << 16;
}

// Add to a part what the trunks of a row gave its `i`-th new token.
static void merge_trunks(const Plan& plan, int64_t kv_heads, int64_t row, int64_t head, int64_t i,
                         Part& part) {
    for (int32_t link = plan.links[row]; link >= 0; link = plan.all_links[link].next) {
        const Trunk& trunk = plan.trunks[plan.all_links[link].trunk];
        const int64_t at = plan.all_links[link].at + i;
        for (int64_t p = 0; p < trunk.parts; p++)
            merge(part, plan.parts[trunk.parts_at + (p * kv_heads + head) * trunk.tokens + at]);
    }
}

// A step's new K and V into their slots, and attention of its queries over their rows' pages: rows
// of any lengths and of any numbers of new tokens, pages anywhere.

#include <atomic>
#include <new>

#include "native_check.h"
#include "native_few.h"
#include "native_plan.h"
#include "native_threads.h"

// A thread's share of the rows of one new token. All rows' pages, a KV head after the other, are
// one line of work, cut wherever that falls; where it cuts a row's head, the first piece waits in
// `tails`, the others in `heads`, by thread.
struct Singles {
    const Call& call;
    const Plan& plan;
    std::vector<Part>&heads, &tails;
    int64_t me, all;
    int64_t tail_end = 0, tail_token = 0, tail_head = 0;

    int64_t work() const { return plan.single_pages * call.layer.kv_heads; }

    void run() {
        const Layer& layer = call.layer;
        const Step& step = call.step;
        const int64_t start = work() * me / all, stop = work() * (me + 1) / all;
        int64_t before = 0;
        for (size_t i = 0; i < plan.singles.size() && before < stop; i++) {
            const int32_t row = plan.singles[i];
            const int64_t first = first_page(plan, layer, row, step.lengths[row] - 1);
            const int64_t many = last_page(step, row) - first;
            if (before + many * layer.kv_heads <= start) {
                before += many * layer.kv_heads;
                continue;
            }
            for (int64_t head = 0; head < layer.kv_heads; head++, before += many) {
                const int64_t from = std::max<int64_t>(start - before, 0);
                const int64_t to = std::min(stop - before, many);
                if (from < to)
                    piece(row, head, first, many, from, to, before, after(i, head, first));
            }
        }
    }

    // The first key behind a head of the `i`-th single row, which sees its pages from `first` on.
    const Number* after(size_t i, int64_t head, int64_t first) const {
        const Layer& layer = call.layer;
        const Step& step = call.step;
        if (head + 1 < layer.kv_heads)
            return layer.key(step.pages(plan.singles[i])[first], head + 1, 0);
        if (i + 1 == plan.singles.size()) return nullptr;
        const int32_t row = plan.singles[i + 1];
        const int64_t page = first_page(plan, layer, row, step.lengths[row] - 1);
        return page < last_page(step, row) ? layer.key(step.pages(row)[page], 0, 0) : nullptr;
    }

    // Pages [from, to) of the `many` that a row has from its page `first` on; `then`: the key that
    // will be wanted next.
    void piece(
        int64_t row, int64_t head, int64_t first, int64_t many, int64_t from, int64_t to,
        int64_t before, const Number* then) {
        const Layer& layer = call.layer;
        const int32_t* pages = call.step.pages(row);
        const int64_t length = call.step.lengths[row], token = call.step.cu_q[row];
        const int64_t seen = layer.first_seen(length - 1);
        if (to == many)
            call.write(token, head, pages[first + many - 1], (length - 1) % PAGE);
        Queries wide;
        widen_queries(call.query(token, head), call.step.q_head, wide);
        Part whole;
        Part& part = from ? heads[me] : to < many ? tails[me] : whole;
        clear(part);
        for (int64_t page = first + from; page < first + to; page++) {
            int64_t slot = page * PAGE < seen ? seen - page * PAGE : 0;
            const int64_t end = length - page * PAGE < PAGE ? length - page * PAGE : PAGE;
            for (; slot < end; slot += SLICE) {
                const int count = int(end - slot < SLICE ? end - slot : SLICE);
                const Number* next = then;
                if (slot + SLICE < end)
                    next = layer.key(pages[page], head, slot + SLICE);
                else if (page + 1 < first + to)
                    next = layer.key(pages[page + 1], head, 0);
                add(wide, layer.key(pages[page], head, slot), layer.value(pages[page], head, slot),
                    count, layer, next, part);
            }
        }
        if (!from) merge_trunks(plan, layer.kv_heads, row, head, 0, part);
        if (from == 0 && to == many)
            finish(part, call.sinks_of(head), call.output(token, head));
        else if (from == 0)
            tail_end = before + many, tail_token = token, tail_head = head;
    }

    // Put together what shares have cut; all have run.
    void end() {
        if (!tail_end) return;
        for (int64_t other = me + 1; other < all && work() * other / all < tail_end; other++)
            if (work() * (other + 1) / all > work() * other / all) merge(tails[me], heads[other]);
        finish(tails[me], call.sinks_of(tail_head), call.output(tail_token, tail_head));
    }
};

static void write_several(const Call& call, const Plan& plan, int64_t me, int64_t all) {
    for (const int32_t row : plan.several) {
        const int64_t begin = call.step.cu_q[row], tokens = call.step.tokens(row);
        const int64_t position = call.step.lengths[row] - tokens;
        const int32_t* pages = call.step.pages(row);
        for (int64_t i = tokens * me / all; i < tokens * (me + 1) / all; i++)
            for (int64_t head = 0; head < call.layer.kv_heads; head++)
                call.write(
                    begin + i, head, pages[(position + i) / PAGE], (position + i) % PAGE);
    }
}

static void run_trunk(const Call& call, Plan& plan, const Task& task, Room& room) {
    const Trunk& trunk = plan.trunks[task.of];
    const int64_t pages = trunk.last - trunk.first;
    const int64_t first = (trunk.first + pages * task.part / trunk.parts) * PAGE;
    const int64_t last = (trunk.first + pages * (task.part + 1) / trunk.parts) * PAGE;
    for (int i = 0; i < task.count; i++)
        begin_lines(
            call, plan.trunk_tokens[trunk.tokens_at + task.first + i], task.head, i, room);
    attend_run(call.layer, trunk.pages, task.head, first, last, task.count, last, room);
    const int64_t to = trunk.parts_at +
                       (task.part * call.layer.kv_heads + task.head) * trunk.tokens + task.first;
    for (int i = 0; i < task.count; i++) get_part(room, i, plan.parts[to + i]);
}

static void run_several(const Call& call, const Plan& plan, const Task& task, Room& room) {
    const Layer& layer = call.layer;
    const int64_t begin = call.step.cu_q[task.of] + task.first;
    const int64_t position =
        call.step.lengths[task.of] - call.step.tokens(task.of) + task.first;  // of the first
    Part part;
    for (int i = 0; i < task.count; i++) {
        begin_lines(call, begin + i, task.head, i, room);
        if (plan.links[task.of] < 0) continue;
        clear(part);
        merge_trunks(plan, layer.kv_heads, task.of, task.head, task.first + i, part);
        set_part(part, i, room);
    }
    attend_run(
        layer, call.step.pages(task.of), task.head,
        std::max(layer.first_seen(position), plan.own[task.of] * PAGE),
        position + task.count, task.count, position, room);
    for (int i = 0; i < task.count; i++) {
        get_part(room, i, part);
        finish(part, call.sinks_of(task.head), call.output(begin + i, task.head));
    }
}

static void run(const Call& call, Plan& plan, std::vector<Part>& heads, std::vector<Part>& tails,
                const Rooms* rooms) {
    const int threads = int(heads.size()), first_processor = processor();
    std::atomic<size_t> trunk{0}, task{0};
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        spread(first_processor);
        Singles singles{call, plan, heads, tails, omp_get_thread_num(), omp_get_num_threads()};
        if (rooms) {
            write_several(call, plan, singles.me, singles.all);
            for (size_t i; (i = trunk++) < plan.trunk_tasks.size();)
                run_trunk(call, plan, plan.trunk_tasks[i], *(*rooms)[singles.me]);
#pragma omp barrier
        }
        singles.run();
        for (size_t i; (i = task++) < plan.tasks.size();)
            run_several(call, plan, plan.tasks[i], *(*rooms)[singles.me]);
#pragma omp barrier
        singles.end();
    }
}

extern "C" {

// Of a step of `tokens` new tokens and a table of `width` pages. Null: `told` says why.
Plan* plan_step(
    const Layer* layer, const Step* step, int64_t tokens, int64_t width, int threads, Told* told) {
    *told = check_step(*layer, *step, tokens, width);
    if (told->what) return nullptr;
    std::unique_ptr<Plan> plan(new (std::nothrow) Plan);
    try {
        if (!plan) throw std::bad_alloc();
        plan->step = *step;
        plan->threads = threads;
        plan->wanted = sizeof(Plan);
        make_plan(*layer, *plan);
    } catch (const std::exception&) {  // also a vector longer than any can be
        told->what = MEMORY, told->a = plan ? plan->wanted : int64_t(sizeof(Plan));
        return nullptr;
    }
    told->trunks = int64_t(plan->trunks.size());
    return plan.release();
}

void drop_plan(Plan* plan) { delete plan; }

// See `Call`. The plan is of this step, and of layers with as many KV heads and this window.
// Returns 0, or how many bytes of memory there weren't: nothing has been done.
int64_t attend(
    const Layer* layer, Plan* plan, const Number* q, const Number* k, const Number* v,
    const float* sinks, Number* out) {
    const int threads = plan->small ? 1 : plan->threads;
    const bool blocks = !plan->several.empty() || !plan->trunks.empty();
    std::vector<Part> heads, tails;
    const Rooms* rooms = nullptr;
    try {
        heads.resize(threads);
        tails.resize(threads);
        if (blocks) rooms = &rooms_for(threads);
    } catch (const std::bad_alloc&) {
        return threads * int64_t(2 * sizeof(Part) + (blocks ? sizeof(Room) : 0));
    }
    run({*layer, plan->step, q, k, v, sinks, out}, *plan, heads, tails, rooms);
    return 0;
}
}

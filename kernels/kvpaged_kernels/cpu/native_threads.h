// Threads of a team on processors of their own.
//
// Two that share one wait for each other, spinning, until the system takes it from one: 8 ms a call
// instead of some microseconds, and on some systems for seconds on end. So whoever finds itself
// where the first thread is moves away, once: what it may run on stays as it was.

#pragma once

#include <omp.h>

#ifdef __linux__
#include <sched.h>

static inline int processor() { return sched_getcpu(); }

static inline void move_away(int from) {
    cpu_set_t all, others;
    if (sched_getaffinity(0, sizeof all, &all)) return;
    others = all;
    CPU_CLR(from, &others);
    if (CPU_COUNT(&others) && !sched_setaffinity(0, sizeof others, &others))
        sched_setaffinity(0, sizeof all, &all);
}
#else
static inline int processor() { return -1; }
static inline void move_away(int) {}
#endif

// At the start of a parallel region; `first`: the processor of its first thread.
static inline void spread(int first) {
    if (first >= 0 && omp_get_thread_num() && processor() == first) move_away(first);
}

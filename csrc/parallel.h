// One way to use threads: independent tasks in contiguous shares, one share to a thread, and whoever is
// done helps the others, so that a core that is busy with something else delays nothing but its own task.
//
// A share goes to the same thread in every call. Weights that are multiplied again and again then stay in
// the caches of one core; handed out as they are asked for, they wander between cores at twice the time.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#if defined(_OPENMP)
#include <omp.h>
#endif

namespace {

constexpr int MOST_SHARES = 64;

// The next task of a share, on a cache line of its own.
struct alignas(64) Share {
    std::atomic<int64_t> next;
    int64_t end;
};

// Calls task(index, number of the thread).
template <class Task>
void parallel_for_threads(int64_t tasks, int threads, const Task& task) {
#if defined(_OPENMP)
    // Either one thread or all of them: changing the size of an OpenMP team ends and starts threads.
    if (threads > 1 && tasks > 1) {
        const int count = std::min(threads, MOST_SHARES);
        Share shares[MOST_SHARES];
        for (int i = 0; i < count; ++i) {
            shares[i].next.store(tasks * i / count, std::memory_order_relaxed);
            shares[i].end = tasks * (i + 1) / count;
        }
#pragma omp parallel num_threads(threads)
        for (int i = 0, own = omp_get_thread_num(); i < count; ++i) {
            Share& share = shares[(own + i) % count];
            int64_t at;
            while ((at = share.next.fetch_add(1, std::memory_order_relaxed)) < share.end)
                task(at, omp_get_thread_num());
        }
        return;
    }
#endif
    (void)threads;
    for (int64_t i = 0; i < tasks; ++i) task(i, 0);
}

template <class Task>
void parallel_for(int64_t tasks, int threads, const Task& task) {
    parallel_for_threads(tasks, threads, [&](int64_t i, int) { task(i); });
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace

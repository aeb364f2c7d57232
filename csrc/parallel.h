// One way to use threads: independent tasks, handed out as they are asked for, so that a core that is
// busy with something else delays nothing but its own task.
#pragma once

#include <cstdint>

namespace {

template <class Task>
void parallel_for(int64_t tasks, int threads, const Task& task) {
#if defined(_OPENMP)
    // Either one thread or all of them: changing the size of an OpenMP team ends and starts threads.
    if (threads > 1 && tasks > 1) {
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
        for (int64_t i = 0; i < tasks; ++i) task(i);
        return;
    }
#endif
    (void)threads;
    for (int64_t i = 0; i < tasks; ++i) task(i);
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace

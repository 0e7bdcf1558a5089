// Independent tasks over torch's own threads, taken one by one so that unequal ones even out.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

#include <omp.h>

namespace gatewright {

inline int threads_for(int64_t tasks) {
  if (omp_in_parallel()) return 1;
  return static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(at::get_num_threads(), tasks)));
}

// Calls body(task, thread) for each of `tasks`. The body must not throw. What a task computes may not depend
// on its thread: then results are the same for every number of threads.
template <class Body>
void run_tasks(int64_t tasks, int threads, const Body& body) {
  if (threads <= 1) {
    for (int64_t task = 0; task < tasks; ++task) body(task, 0);
    return;
  }
  std::atomic<int64_t> next{0};
#pragma omp parallel num_threads(threads)
  {
    const int thread = omp_get_thread_num();
    for (int64_t task = next.fetch_add(1); task < tasks; task = next.fetch_add(1)) body(task, thread);
  }
}

// Calls first(task) for each task of the first kind and then, when all of them are done, second(task).
template <class First, class Second>
void run_two(int64_t firsts, int64_t seconds, int threads, const First& first, const Second& second) {
  if (threads <= 1) {
    for (int64_t task = 0; task < firsts; ++task) first(task);
    for (int64_t task = 0; task < seconds; ++task) second(task);
    return;
  }
  std::atomic<int64_t> next{0}, then{0};
#pragma omp parallel num_threads(threads)
  {
    for (int64_t task = next.fetch_add(1); task < firsts; task = next.fetch_add(1)) first(task);
#pragma omp barrier
    for (int64_t task = then.fetch_add(1); task < seconds; task = then.fetch_add(1)) second(task);
  }
}

// Calls body(begin, end) over 0..size in pieces of `grain`.
template <class Body>
void run_range(int64_t size, int64_t grain, const Body& body) {
  const int64_t pieces = (size + grain - 1) / grain;
  run_tasks(pieces, threads_for(pieces), [&](int64_t piece, int) {
    body(piece * grain, std::min(size, (piece + 1) * grain));
  });
}

}  // namespace gatewright

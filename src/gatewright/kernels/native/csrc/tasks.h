// Independent tasks over torch's own threads, taken one by one so that unequal ones even out.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <vector>

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

// Tasks in ranges, one for each thread, so that a thread reads on where it was; who is done helps the others.
class Ranges {
 public:
  Ranges(int64_t tasks, int threads) : places_(threads) {
    for (int i = 0; i < threads; ++i) {
      places_[i].next = tasks * i / threads;
      places_[i].end = tasks * (i + 1) / threads;
    }
  }

  template <class Body>
  void run(int thread, const Body& body) {
    const int threads = static_cast<int>(places_.size());
    for (int i = 0; i < threads; ++i) {
      Place& place = places_[(thread + i) % threads];
      for (int64_t task = place.next.fetch_add(1); task < place.end; task = place.next.fetch_add(1)) body(task);
    }
  }

 private:
  struct alignas(64) Place {
    std::atomic<int64_t> next;
    int64_t end;
  };
  std::vector<Place> places_;
};

// Calls first(task) for each of `firsts`, and when all of them are done second(task) for each of `seconds`, for
// tasks that read much memory and share no sums.
template <class First, class Second>
void run_two(int64_t firsts, int64_t seconds, int threads, const First& first, const Second& second) {
  if (threads <= 1) {
    for (int64_t task = 0; task < firsts; ++task) first(task);
    for (int64_t task = 0; task < seconds; ++task) second(task);
    return;
  }
  Ranges before(firsts, threads), after(seconds, threads);
#pragma omp parallel num_threads(threads)
  {
    const int thread = omp_get_thread_num();
    before.run(thread, first);
    if (seconds > 0) {
#pragma omp barrier
      after.run(thread, second);
    }
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

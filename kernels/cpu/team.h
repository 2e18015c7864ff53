// The threads of one parallel region: work handed out in pieces, and a barrier between phases.
// Pieces are taken from a counter rather than dealt out, so a thread that loses its core to another process delays one piece, not a phase.
#pragma once
#include <immintrin.h>
#include <omp.h>
#include <sched.h>

#include <algorithm>
#include <atomic>

namespace cpu {

class Team {
 public:
  int size = 1;

  // Calls body(begin, end) over [0, count) in pieces of `piece`. Every thread of the team must come here, then to barrier().
  template <class Body>
  void share(int count, int piece, Body&& body) {
    if (size == 1) {
      if (count > 0) body(0, count);
      return;
    }
    for (;;) {
      int begin = next_.fetch_add(piece, std::memory_order_relaxed);
      if (begin >= count) return;
      body(begin, std::min(begin + piece, count));
    }
  }

  // Waits for the whole team: a few microseconds of spinning, then the core is offered to whoever wants it, which may be a thread of this team that
  // has none. Two threads on one core take 5.8 ms for a token so and 18 with 2,000 spins (one thread: 4.2); with a core each there is no difference.
  void barrier() {
    if (size == 1) return;
    int generation = generation_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) == size - 1) {
      arrived_.store(0, std::memory_order_relaxed);
      next_.store(0, std::memory_order_relaxed);
      generation_.store(generation + 1, std::memory_order_release);
      return;
    }
    for (int spin = 0; generation_.load(std::memory_order_acquire) == generation; ++spin) {
      if (spin < kSpins) _mm_pause();
      else sched_yield();
    }
  }

  // A piece that gives each thread about `per_thread` pieces of `count`.
  int piece(int count, int per_thread) const { return std::max(1, count / (size * per_thread)); }

 private:
  static constexpr int kSpins = 100;
  alignas(64) std::atomic<int> next_{0};
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<int> generation_{0};
};

// Runs body(team, thread) on `num_threads` threads of libgomp's pool, which is torch's own.
template <class Body>
void run_team(int num_threads, Body&& body) {
  Team team;
  if (num_threads <= 1) {
    body(team, 0);
    return;
  }
#pragma omp parallel num_threads(num_threads)
  {
#pragma omp single
    team.size = omp_get_num_threads();
    body(team, omp_get_thread_num());
  }
}

}  // namespace cpu

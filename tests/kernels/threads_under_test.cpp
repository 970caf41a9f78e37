// Loops whose items count how often they run: test_cpu_threads.py compiles this.
#include "vectors.h"
#include "threads.h"
#include "tiles.h"

struct Loops {
  int64_t num_loops, max_items, num_threads, num_callers, sleep_every, seed;
};

// The number of items that have not run exactly once, over all loops of all callers.
extern "C" int64_t nanovllm_wrong_items(const Loops* loops) {
  std::atomic<int64_t> num_wrong{0};
  auto call = [&](uint64_t random) {
    for (int64_t loop = 0; loop < loops->num_loops; ++loop) {
      random = random * 6364136223846793005 + 1442695040888963407;
      const int64_t num_items = 1 + (random >> 33) % loops->max_items;
      const int64_t num_threads = 1 + (random >> 20) % loops->num_threads;
      std::vector<std::atomic<int>> counts(num_items);
      parallel_for(num_items, num_threads, [&](int64_t item) {
        if (loops->sleep_every && (item + loop) % loops->sleep_every == 0)
          std::this_thread::sleep_for(std::chrono::microseconds(300));
        counts[item].fetch_add(1);
      });
      for (auto& count : counts) num_wrong += count.load() != 1;
    }
  };
  std::vector<std::thread> callers;
  for (int64_t i = 0; i < loops->num_callers; ++i) callers.emplace_back(call, loops->seed + i);
  for (auto& caller : callers) caller.join();
  return num_wrong.load();
}

// The pauses of one caller's helpers, with the test's own times.
static Pauses pauses;

extern "C" void nanovllm_pauses_begin() { pauses = Pauses(); }

extern "C" void nanovllm_pauses_loop(int64_t own, int64_t num_own, int64_t num_others, int64_t wait,
                                     int64_t now) {
  pauses.helped(own, num_own, num_others, 1);
  if (wait > 0) pauses.waited(own, wait, now);
}

extern "C" int64_t nanovllm_pauses_time_alone(int64_t now) { return pauses.time_alone(now); }

// The threads of our CPU kernels. kernels.cpp has them, and lends them to the other libraries.
//
// OpenMP's threads spin for milliseconds, and each of its loops ends when every thread has arrived,
// also one that has found no work. On a core that another process uses, a thread may be off the core
// for a time slice, and a step has a hundred loops. Here a loop ends when its items are done. The
// caller takes items itself and waits only for those that a helper has begun. On cores with many
// other processes these waits cost more than helpers gain, so the caller then works alone for a
// while. Which thread runs an item never changes its result.

#include <chrono>
#include <condition_variable>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#include <signal.h>
#endif

namespace {

inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("isb" ::: "memory");
#endif
}

// A number that threads wait for: they poll it for a while, and then sleep.
class Awaited {
 public:
  std::atomic<uint64_t> value{0};

  void add(uint64_t number) {
    value.fetch_add(number);
    if (num_asleep_.load() == 0) return;
    std::lock_guard<std::mutex> lock(mutex_);
    changed_.notify_all();
  }

  // Returns when is_there(value). One poll takes 10 to 60 ns.
  template <typename Test>
  void wait(int num_looks, const Test& is_there) {
    for (int look = 0; look < num_looks; ++look) {
      if (is_there(value.load(std::memory_order_acquire))) return;
      relax();
    }
    std::unique_lock<std::mutex> lock(mutex_);
    num_asleep_.fetch_add(1);
    changed_.wait(lock, [&] { return is_there(value.load()); });
    num_asleep_.fetch_sub(1);
  }

 private:
  std::atomic<int> num_asleep_{0};
  std::mutex mutex_;
  std::condition_variable changed_;
};

// Decides which loops of a caller begin without helpers. All times are in nanoseconds.
//
// Helpers gain the time of the items that they run. They lose a caller's wait if one of them was
// taken off its core in the midst of an item. Losses above the gains begin a pause, and each pause
// that had no effect makes the next one longer.
class Pauses {
 public:
  static constexpr int64_t kLate = 1'000'000;          // shorter waits are not for a time slice
  static constexpr int64_t kMaxGain = 10'000'000;      // so much of the gains is remembered
  static constexpr int64_t kWaits = 4;                 // a first pause, in waits
  static constexpr int64_t kMaxPause = 1'000'000'000;  // then helpers are tried again

  // A loop that begins now has no helpers until it has taken longer than this: a longer loop is
  // worth a wait.
  int64_t time_alone(int64_t now) const { return now < end_ ? last_wait_ : 0; }

  // The caller of a loop has run `num_own` items in a time of `own`, and helpers `num_others`.
  void helped(int64_t own, int64_t num_own, int64_t num_others, int64_t num_helpers) {
    // an `own` of many milliseconds may be an absence from the core, which says nothing of items
    const int64_t ratio_limit = num_helpers * num_own;
    if (num_own == 0) return;
    gain_ = std::min(kMaxGain, gain_ + std::min(own, kLate) * std::min(num_others, ratio_limit) /
                                           num_own);
  }

  // Then it has waited until `now` for the last of their items.
  void waited(int64_t own, int64_t wait, int64_t now) {
    if (wait < kLate || wait < own) return;
    gain_ -= wait;
    if (gain_ >= 0) return;
    const bool is_again = now - wait - end_ < pause_;
    pause_ = std::min(kMaxPause, std::max(kWaits * wait, is_again ? 2 * pause_ : 0));
    last_wait_ = wait;
    end_ = now + pause_;
    gain_ = 0;
  }

 private:
  int64_t gain_ = 0;
  int64_t pause_ = 0, end_ = 0;  // of the last pause
  int64_t last_wait_ = 0;
};

// The threads that help one thread with its loops.
template <typename Clock = std::chrono::steady_clock>
class Helpers : public std::enable_shared_from_this<Helpers<Clock>> {
 public:
  void loop(int64_t num_items, int64_t num_threads, void (*run)(const void*, int64_t),
            const void* work) {
    const int64_t begin = now();
    int64_t num_own = 0, item;
    for (const int64_t alone = pauses_.time_alone(begin); alone > 0;) {
      run(work, num_own++);
      if (num_own == num_items) return;
      if (now() - begin > alone) break;
    }

    start(num_threads - 1);
    // A helper that reads one of these sees that the last loop is closed.
    std::atomic_thread_fence(std::memory_order_release);
    run_.store(run, std::memory_order_relaxed);
    work_.store(work, std::memory_order_relaxed);
    num_items_.store(num_items, std::memory_order_relaxed);
    num_helpers_.store(num_threads - 1, std::memory_order_relaxed);
    num_done_.value.store(0, std::memory_order_relaxed);
    next_.store(++number_ << 32 | num_own, std::memory_order_release);
    num_loops_.add(1);

    for (; (item = next_.fetch_add(1, std::memory_order_relaxed) & kItem) < num_items; ++num_own)
      run(work, item);
    const uint64_t num_others = num_items - num_own;
    const int64_t own_end = now();
    pauses_.helped(own_end - begin, num_own, num_others, num_threads - 1);
    if (num_done_.value.load(std::memory_order_acquire) != num_others) {
      num_done_.wait(kCallerLooks, [=](uint64_t num_done) { return num_done == num_others; });
      const int64_t end = now();
      pauses_.waited(own_end - begin, end - own_end, end);
    }
    next_.store(number_ << 32 | kItem, std::memory_order_release);  // closed
  }

  void end() {
    is_ended_.store(true);
    num_loops_.add(1);
  }

 private:
  // Looks for the next loop: longer than the host takes between two kernels of a step.
  static constexpr int kHelperLooks = 4000;
  static constexpr int kCallerLooks = 1000;
  static constexpr uint64_t kItem = 0xffffffff;

  static int64_t now() {
    return std::chrono::nanoseconds(Clock::now().time_since_epoch()).count();
  }

  void start(int64_t num_helpers) {
    if (num_started_ >= num_helpers) return;
#if defined(__unix__) || defined(__APPLE__)
    sigset_t all, before;  // signals are for the threads of the program
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
#endif
    try {
      for (; num_started_ < num_helpers; ++num_started_) {
        const uint64_t seen = num_loops_.value.load();
        std::thread([=, all = this->shared_from_this(), index = num_started_] {
          all->help(index, seen);
        }).detach();
      }
    } catch (const std::system_error&) {
      num_started_ = INT64_MAX;  // the system allows no more threads: those that are there must do
    }
#if defined(__unix__) || defined(__APPLE__)
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
#endif
  }

  void help(int64_t index, uint64_t num_seen) {
    while (!is_ended_.load()) {
      take_items(index);
      num_loops_.wait(kHelperLooks, [&](uint64_t num_loops) { return num_loops != num_seen; });
      num_seen = num_loops_.value.load();
    }
  }

  // A helper takes an item by exchanging the loop's number and the item together. It fails if this
  // loop has ended, so what it has read belongs to the loop of an item that it gets.
  void take_items(int64_t index) {
    int64_t num_taken = 0;
    uint64_t at = next_.load(std::memory_order_acquire);
    while (true) {
      const auto run = run_.load(std::memory_order_relaxed);
      const void* work = work_.load(std::memory_order_relaxed);
      const int64_t item = at & kItem;
      if (item >= num_items_.load(std::memory_order_relaxed) ||
          index >= num_helpers_.load(std::memory_order_relaxed))
        break;
      std::atomic_thread_fence(std::memory_order_acquire);
      if (!next_.compare_exchange_weak(at, at + 1, std::memory_order_acq_rel)) continue;
      run(work, item);
      ++num_taken;
      at = next_.load(std::memory_order_acquire);
    }
    if (num_taken > 0) num_done_.add(num_taken);
  }

  alignas(64) std::atomic<uint64_t> next_{kItem};  // a loop's number, and its next item
  std::atomic<void (*)(const void*, int64_t)> run_{nullptr};
  std::atomic<const void*> work_{nullptr};
  std::atomic<int64_t> num_items_{0}, num_helpers_{0};
  alignas(64) Awaited num_loops_;
  alignas(64) Awaited num_done_;
  std::atomic<bool> is_ended_{false};
  uint64_t number_ = 0;      // of the last loop
  int64_t num_started_ = 0;  // helpers
  Pauses pauses_;
};

inline std::atomic<int> num_forks{0};

// The helpers of a thread, until it ends. A forked process has none of its parent's threads.
class Owned {
 public:
  Helpers<>& get() {
    if (helpers_ == nullptr || born_ != num_forks.load(std::memory_order_relaxed)) {
      new (&helpers_) std::shared_ptr<Helpers<>>(std::make_shared<Helpers<>>());
      born_ = num_forks.load();
    }
    return *helpers_;
  }

  ~Owned() {
    if (helpers_ != nullptr && born_ == num_forks.load()) helpers_->end();
  }

 private:
  std::shared_ptr<Helpers<>> helpers_;
  int born_ = 0;
};

void loop_on_threads(int64_t num_items, int64_t num_threads, void (*run)(const void*, int64_t),
                     const void* work) {
#if defined(__unix__) || defined(__APPLE__)
  static const int watches_forks =
      pthread_atfork(nullptr, nullptr, [] { num_forks.fetch_add(1, std::memory_order_relaxed); });
  (void)watches_forks;
#endif
  thread_local Owned owned;
  owned.get().loop(num_items, num_threads, run, work);
}

}  // namespace

// For the libraries that have no threads of their own.
extern "C" Loop nanovllm_loop() { return loop_on_threads; }

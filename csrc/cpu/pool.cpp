#include "pool.h"

#include <pthread.h>
#include <signal.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <exception>
#include <limits>
#include <memory>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

namespace lowbit::cpu {
namespace {

using Clock = std::chrono::steady_clock;

// Pieces of a call per thread: what a thread that comes late leaves to the others is a part of its share.
constexpr int64_t kChunksPerThread = 8;
// A caller waits this long for its team after its own work, and twice the time of a chunk, before the team counts as
// late. Waking a thread takes up to 0.1 ms on a virtual machine; a slice of the scheduler is 0.7 ms or more.
constexpr std::chrono::microseconds kLate{500};
// So long a wait beside a second team means that this did not help: the pool serves.
constexpr std::chrono::milliseconds kVeryLate{2};
// After a wait of t, what helps lasts for 50 t: waits then take at most a fiftieth of the time.
constexpr int64_t kPenalty = 50;
constexpr std::chrono::seconds kLongestPenalty{1};
// A caller works this long before it wakes helpers of the pool, which takes it 5 us each. Smaller calls stay on one
// thread.
constexpr std::chrono::microseconds kAlone{50};
// How long a caller keeps its core while others finish what they claimed. Then it sleeps: one of them may need the
// core.
constexpr std::chrono::microseconds kSpin{50};
constexpr int64_t kMostHelpers = 255;
constexpr int kSlots = 8;  // calls that share the helpers at a time; one more runs on its own thread

thread_local bool in_body = false;

void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Whether ready() becomes true before `deadline`.
template <class Ready>
bool spin_until(const Ready& ready, Clock::time_point deadline) {
  do {
    for (int i = 0; i < 16; ++i) {
      if (ready()) return true;
      pause();
    }
  } while (Clock::now() < deadline);
  return false;
}

// The work of a call, on its caller's stack.
class Call {
 public:
  Call(const Body& body, int64_t count, int64_t chunk)
      : chunks(ceil_div(count, chunk)), body_(body), count_(count), chunk_(chunk) {}

  void run(int64_t index) noexcept {
    const bool before = in_body;
    in_body = true;
    try {
      body_(index * chunk_, std::min(count_, (index + 1) * chunk_));
    } catch (...) {
      if (!failed_.exchange(true)) error_ = std::current_exception();
    }
    in_body = before;
  }
  void rethrow() const {
    if (error_) std::rethrow_exception(error_);
  }

  const int64_t chunks;

 private:
  const Body& body_;
  const int64_t count_, chunk_;
  std::atomic<bool> failed_{false};
  std::exception_ptr error_{};
};

// --- the team

// A time that others may move.
class Deadline {
 public:
  bool is_ahead() const { return Clock::now().time_since_epoch().count() < at_.load(std::memory_order_relaxed); }
  void set(Clock::time_point at) { at_.store(at.time_since_epoch().count(), std::memory_order_relaxed); }

 private:
  std::atomic<Clock::rep> at_{std::numeric_limits<Clock::rep>::min()};
};

Deadline second_team_until, pool_until;

// Starts a thread on which no signal is handled: a new thread inherits the mask of the one that starts it, and signals
// are for the threads that the program knows. Returns false where the system allows no more threads.
template <class Function>
bool start_thread(const Function& function) {
  sigset_t all, before;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  bool started = true;
  try {
    std::thread(function).detach();
  } catch (const std::system_error&) {
    started = false;
  }
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
  return started;
}

// While the team is late, a thread holds a second one of its size. GNU's OpenMP then has more threads than cores, and a
// thread of it that waits sleeps after 100 looks instead of 300 000, which are longer than a slice (GOMP_SPINCOUNT in
// its manual). So a caller that shares its core with a thread of its team gives it the core, in torch's own operators
// too: such an operator and a product of 576 x 576 after it take 0.5 ms beside a busy process instead of 8 to 28. With
// no other process a second team costs a training step a quarter, so it ends once the first counts as on time.
// Returns whether there was one before.
bool hold_second_team(int64_t threads, const Team& team) {
  static std::atomic<bool> held{false};
  if (held.exchange(true)) return true;
  const bool started = start_thread([threads, team] {
    try {
      team(threads, [](int64_t) {});
    } catch (...) {  // no second team; nobody is there to tell
    }
    while (second_team_until.is_ahead()) std::this_thread::sleep_for(std::chrono::milliseconds(10));
    held.store(false);
  });
  if (!started) held.store(false);
  return false;
}

// Each thread has a range of chunks, so that one that is called again and again finds its part of the weight in its
// cache; then it takes what others have left of theirs.
void run_in_team(Call& call, int64_t threads, const Team& team) {
  struct alignas(64) Range {
    std::atomic<int64_t> next;
    int64_t end;
  };
  std::vector<Range> ranges(static_cast<size_t>(threads));
  const auto range = [&](int64_t i) -> Range& { return ranges[static_cast<size_t>(i % threads)]; };
  for (int64_t i = 0; i < threads; ++i) {
    range(i).next.store(call.chunks * i / threads, std::memory_order_relaxed);
    range(i).end = call.chunks * (i + 1) / threads;
  }
  Clock::duration own{0};
  int64_t own_chunks = 0;
  const Clock::time_point start = Clock::now();
  team(threads, [&](int64_t part) {
    const Clock::time_point begin = Clock::now();
    int64_t done = 0;
    for (int64_t i = part; i < part + threads; ++i)
      for (int64_t chunk; (chunk = range(i).next.fetch_add(1, std::memory_order_relaxed)) < range(i).end; ++done)
        call.run(chunk);
    if (part > 0) return;
    own = Clock::now() - begin;
    own_chunks = std::max<int64_t>(done, 1);
  });
  const Clock::time_point end = Clock::now();
  const Clock::duration waited = end - start - own;
  if (waited < kLate + 2 * own / own_chunks) return;
  const Clock::time_point until = end + std::min<Clock::duration>(kPenalty * waited, kLongestPenalty);
  second_team_until.set(until);
  if (hold_second_team(threads, team) && waited > kVeryLate) pool_until.set(until);
}

// --- the pool

// A place for one call at a time. It outlives all calls, so that late helpers may look at it.
class alignas(64) Slot {
 public:
  bool take() { return !taken_.load(std::memory_order_relaxed) && !taken_.exchange(true, std::memory_order_acquire); }
  void leave() { taken_.store(false, std::memory_order_release); }

  // Lets this many helpers claim the chunks of a call from `first` on.
  void publish(Call& call, int64_t first, int64_t helpers) {
    call_.store(&call, std::memory_order_relaxed);
    helpers_.store(helpers, std::memory_order_relaxed);
    finished_.store(0, std::memory_order_relaxed);
    const uint64_t number = (ticket_.load(std::memory_order_relaxed) >> kChunkBits) + 1;
    ticket_.store(number << kChunkBits | static_cast<uint64_t>(call.chunks - first), std::memory_order_release);
  }

  // Runs a chunk that nobody has claimed; false if there is none for this helper.
  bool help(int64_t helper) {
    if (!claim_and_run(helper)) return false;
    finished_.fetch_add(1, std::memory_order_release);
    finished_.notify_one();
    return true;
  }

  // Runs the chunks that nobody else claims, and waits for those that somebody did.
  void finish(int64_t chunks) {
    int32_t others = static_cast<int32_t>(chunks);
    while (claim_and_run(kCaller)) --others;
    const auto ready = [&] { return finished_.load(std::memory_order_acquire) == others; };
    if (spin_until(ready, Clock::now() + kSpin)) return;
    for (int32_t seen; (seen = finished_.load(std::memory_order_acquire)) != others;)
      finished_.wait(seen, std::memory_order_acquire);
  }

  static constexpr int kChunkBits = 24;

 private:
  static constexpr int64_t kCaller = -1;

  // The exchange succeeds only if the ticket is still that of the call whose fields are read, and that call cannot end
  // before this chunk does.
  bool claim_and_run(int64_t helper) {
    uint64_t ticket = ticket_.load(std::memory_order_acquire), left;
    do {
      left = ticket % (uint64_t{1} << kChunkBits);
      if (left == 0 || helper >= helpers_.load(std::memory_order_relaxed)) return false;
    } while (!ticket_.compare_exchange_weak(ticket, ticket - 1, std::memory_order_acquire));
    Call& call = *call_.load(std::memory_order_relaxed);
    call.run(call.chunks - static_cast<int64_t>(left));
    return true;
  }

  std::atomic<uint64_t> ticket_{0};  // the number of the call, and how many of its chunks nobody has claimed
  std::atomic<Call*> call_{nullptr};
  std::atomic<int64_t> helpers_{0};
  std::atomic<bool> taken_{false};
  alignas(64) std::atomic<int32_t> finished_{0};  // chunks that helpers have finished
};

class Pool {
 public:
  void run(Call& call, int64_t helpers) {
    const Clock::time_point start = Clock::now();
    int64_t next = 0;
    while (next < call.chunks && Clock::now() - start < kAlone) call.run(next++);
    if (next < call.chunks) {
      helpers = start_helpers(std::min({helpers, call.chunks - next, kMostHelpers}));
      for (Slot& slot : slots_) {
        if (!slot.take()) continue;
        slot.publish(call, next, helpers);
        published_.fetch_add(1, std::memory_order_seq_cst);
        for (int64_t i = 0; i < helpers; ++i) wake(i);
        slot.finish(call.chunks - next);
        slot.leave();
        return;
      }
    }
    while (next < call.chunks) call.run(next++);
  }

 private:
  struct alignas(64) Helper {
    std::atomic<uint32_t> asleep{0};
  };

  // Returns how many of `wanted` helpers there are, after starting those that are missing.
  int64_t start_helpers(int64_t wanted) {
    if (started_.load(std::memory_order_acquire) >= wanted) return wanted;
    const std::lock_guard<std::mutex> lock(starting_);
    int64_t started = started_.load(std::memory_order_relaxed);
    while (started < wanted && start_thread([this, started] { help(started); })) ++started;
    started_.store(started, std::memory_order_release);
    return std::min(started, wanted);
  }

  void wake(int64_t helper) {
    std::atomic<uint32_t>& asleep = helpers_[helper].asleep;
    if (asleep.load(std::memory_order_seq_cst) && asleep.exchange(0)) asleep.notify_one();
  }

  [[noreturn]] void help(int64_t helper) {
    std::atomic<uint32_t>& asleep = helpers_[helper].asleep;
    for (;;) {
      const uint32_t seen = published_.load(std::memory_order_acquire);
      for (Slot& slot : slots_)
        while (slot.help(helper)) {
        }
      asleep.store(1, std::memory_order_seq_cst);
      // A call that is published after this look finds that the helper sleeps.
      if (published_.load(std::memory_order_seq_cst) == seen) asleep.wait(1, std::memory_order_acquire);
      asleep.store(0, std::memory_order_relaxed);
    }
  }

  Slot slots_[kSlots];
  alignas(64) std::atomic<uint32_t> published_{0};  // calls so far
  std::atomic<int64_t> started_{0};
  std::mutex starting_;
  Helper helpers_[kMostHelpers];
};

// Never destroyed: helpers look at it until the process has ended.
std::atomic<Pool*> current_pool{nullptr};
std::atomic<bool> forked{false};

// A child has none of its parent's threads: it makes a pool of its own.
[[maybe_unused]] const int watched = pthread_atfork(nullptr, nullptr, [] {
  current_pool.store(nullptr);
  forked.store(true);
});

Pool& pool() {
  Pool* pool = current_pool.load(std::memory_order_acquire);
  if (pool) return *pool;
  auto made = std::make_unique<Pool>();
  return current_pool.compare_exchange_strong(pool, made.get()) ? *made.release() : *pool;
}

}  // namespace

void share(int64_t count, int64_t grain, int64_t threads, const Team& team, const Body& body) {
  if (count <= 0) return;
  const int64_t chunk =
      std::max({ceil_div(count, kChunksPerThread * std::max<int64_t>(threads, 1)), grain, int64_t{1}});
  if (threads <= 1 || count <= chunk || in_body) return body(0, count);
  Call call(body, count, chunk);
  const int64_t helpers = std::min(threads, call.chunks) - 1;
  if (forked.load(std::memory_order_relaxed) || pool_until.is_ahead()) {
    pool().run(call, helpers);
  } else {
    run_in_team(call, helpers + 1, team);
  }
  call.rethrow();
}

}  // namespace lowbit::cpu

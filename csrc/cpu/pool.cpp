#include "pool.h"

#include <pthread.h>
#include <signal.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <exception>
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
  team(threads, [&](int64_t part) {
    for (int64_t i = part; i < part + threads; ++i)
      for (int64_t chunk; (chunk = range(i).next.fetch_add(1, std::memory_order_relaxed)) < range(i).end;)
        call.run(chunk);
  });
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

namespace {

// run(call, helpers) on the pieces of [0, count).
template <class Run>
void share_by(int64_t count, int64_t grain, int64_t threads, const Body& body, const Run& run) {
  if (count <= 0) return;
  const int64_t chunk =
      std::max({ceil_div(count, kChunksPerThread * std::max<int64_t>(threads, 1)), grain, int64_t{1}});
  if (threads <= 1 || count <= chunk || in_body) return body(0, count);
  Call call(body, count, chunk);
  run(call, std::min(threads, call.chunks) - 1);
  call.rethrow();
}

}  // namespace

void share(int64_t count, int64_t grain, int64_t threads, const Team& team, const Body& body) {
  if (forked.load(std::memory_order_relaxed)) return share_without_team(count, grain, threads, body);
  share_by(count, grain, threads, body, [&](Call& call, int64_t helpers) { run_in_team(call, helpers + 1, team); });
}

void share_without_team(int64_t count, int64_t grain, int64_t threads, const Body& body) {
  share_by(count, grain, threads, body, [](Call& call, int64_t helpers) { pool().run(call, helpers); });
}

}  // namespace lowbit::cpu

// Checks how calls are shared among threads (csrc/cpu/pool.h), without torch and under the sanitizer of threads.
//
//   pool    prints each failure, and "N passed, N failed"; exit status 1 if any failed
#include "../../csrc/cpu/pool.h"

#include <pthread.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <mutex>
#include <new>
#include <set>
#include <stdexcept>

#include "values.h"

namespace {

using namespace std::chrono_literals;
using Clock = std::chrono::steady_clock;

std::atomic<int> team_calls{0};

// New threads for each call.
const Team new_threads = [](int64_t parts, const std::function<void(int64_t)>& part) {
  ++team_calls;
  std::vector<std::thread> others;
  for (int64_t i = 1; i < parts; ++i) others.emplace_back([=, &part] { part(i); });
  part(0);
  for (auto& thread : others) thread.join();
};

// A call by the team, or by the pool if `in_pool`.
bool in_pool = false;
void call(int64_t count, int64_t grain, int64_t threads, const Body& body) {
  if (in_pool) return share_without_team(count, grain, threads, body);
  share(count, grain, threads, new_threads, body);
}

void work_for(std::chrono::microseconds time) {
  for (const auto end = Clock::now() + time; Clock::now() < end;) {
  }
}

// Whether each of `count` elements was visited once, by pieces of at least `grain`. They are plain numbers, so that the
// sanitizer reports two visitors of one, and a caller that does not wait.
bool visits_all(int64_t count, int64_t grain, int64_t threads) {
  std::vector<int> visits(static_cast<size_t>(count));
  std::atomic<bool> right{true};
  call(count, grain, threads, [&](int64_t begin, int64_t end) {
    if (end - begin < grain && end < count) right = false;
    for (int64_t i = begin; i < end; ++i) ++visits[static_cast<size_t>(i)];
    if (count == 64) work_for(20us);
  });
  for (const int visit : visits) right = right && visit == 1;
  return right;
}

void check_pieces(const std::string& way) {
  for (const int64_t count : {0, 1, 2, 7, 64, 1000, 100003})
    for (const int64_t grain : {1, 3, 64, 5000})
      for (const int64_t threads : {1, 2, 3, 8})
        report(visits_all(count, grain, threads), way + ": pieces of " + std::to_string(count) + " by " +
                                                      std::to_string(grain) + ", " + std::to_string(threads) +
                                                      " threads");
}

// Runs body() at once on all of `threads` threads of a call; returns these threads. Pieces wait until all have one, for
// five seconds at most. (The first does not: a caller of the pool runs it before it asks for help.)
template <class AtOnce>
std::set<std::thread::id> meet(int64_t threads, const AtOnce& body) {
  std::mutex mutex;
  std::set<std::thread::id> seen;
  std::atomic<int64_t> inside{0};
  const auto patience = Clock::now() + 5s;
  call(64, 1, threads, [&](int64_t begin, int64_t) {
    if (begin == 0 && threads > 1) return work_for(100us);
    {
      const std::lock_guard<std::mutex> lock(mutex);
      if (seen.insert(std::this_thread::get_id()).second) ++inside;
    }
    while (inside < threads && Clock::now() < patience) std::this_thread::sleep_for(100us);
    body();
  });
  return seen;
}

void check_exceptions(const std::string& way) {
  for (const int64_t thrower : {0, 3, 15}) {
    std::atomic<int> ran{0};
    bool thrown = false;
    try {
      call(16, 1, 2, [&](int64_t begin, int64_t) {
        ++ran;
        work_for(20us);
        if (begin == thrower) throw std::bad_alloc();
      });
    } catch (const std::bad_alloc&) {
      thrown = true;
    }
    report(thrown && ran == 16, way + ": the exception of piece " + std::to_string(thrower));
  }
  int caught = 0;
  try {
    call(16, 1, 2, [](int64_t, int64_t) {
      work_for(20us);
      throw std::runtime_error("each");
    });
  } catch (const std::runtime_error&) {
    ++caught;
  }
  report(caught == 1 && visits_all(1000, 1, 2), way + ": a call after one whose pieces all threw");
}

// A body that calls share runs that call on its own thread: a helper that waited for helpers could wait for itself.
void check_nested(const std::string& way) {
  std::atomic<int> sum{0};
  std::atomic<bool> same_thread{true};
  call(24, 1, 3, [&](int64_t, int64_t) {
    const auto own = std::this_thread::get_id();
    work_for(20us);
    share(20, 1, 3, new_threads, [&](int64_t begin, int64_t end) {
      work_for(20us);
      if (std::this_thread::get_id() != own) same_thread = false;
      sum += static_cast<int>(end - begin);
    });
  });
  report(same_thread && sum % 20 == 0 && sum > 0, way + ": nested calls");
}

// More callers at once than there are places in the pool.
void check_callers(const std::string& way) {
  std::atomic<int> wrong{0};
  std::vector<std::thread> callers;
  for (int caller = 0; caller < 12; ++caller) {
    callers.emplace_back([&, caller] {
      for (int turn = 0; turn < 40; ++turn) {
        const int64_t count = 500 + 37 * caller + turn;
        std::atomic<int64_t> sum{0};
        call(count, 1, 2 + turn % 3, [&](int64_t begin, int64_t end) {
          work_for(10us);
          for (int64_t i = begin; i < end; ++i) sum += i;
        });
        if (sum != count * (count - 1) / 2) ++wrong;
      }
    });
  }
  for (auto& caller : callers) caller.join();
  report(wrong == 0, way + ": " + std::to_string(wrong) + " sums of callers at once");
}

void check_all(bool with_pool) {
  in_pool = with_pool;
  const std::string way = in_pool ? "pool" : "team";
  check_pieces(way);
  check_exceptions(way);
  check_nested(way);
  check_callers(way);
}

// A call whose helpers do not come ends as fast as its caller can: here they are busy with pieces of another call, as
// they would be where a process has their cores.
void check_absent_helpers() {
  std::atomic<int> busy{0};
  std::atomic<bool> go{false};
  std::thread other([&] {
    meet(3, [&] {
      ++busy;
      while (!go) std::this_thread::sleep_for(1ms);
    });
  });
  const auto patience = Clock::now() + 10s;
  while (busy < 3 && Clock::now() < patience) std::this_thread::sleep_for(1ms);
  report(busy == 3, "helpers come where they are free");
  report(visits_all(1000, 1, 3) && visits_all(64, 1, 3), "a call returns although no helper is free");
  go = true;
  other.join();
}

void check_numbers_of_threads() {
  for (const int64_t threads : {1, 2, 5, 3, 2, 1}) {
    const auto seen = meet(threads, [] { work_for(100us); });
    report(seen.size() == static_cast<size_t>(threads) && seen.count(std::this_thread::get_id()),
           std::to_string(threads) + " threads, the caller among them");
  }
}

// A signal handled on a helper would run a program's handler on a thread that it does not know.
void check_signals() {
  const auto caller = std::this_thread::get_id();
  std::atomic<bool> right{true};
  meet(3, [&] {
    sigset_t mask;
    pthread_sigmask(SIG_BLOCK, nullptr, &mask);
    for (const int signal : {SIGINT, SIGTERM, SIGCHLD, SIGALRM})
      if ((std::this_thread::get_id() == caller) == (sigismember(&mask, signal) == 1)) right = false;
  });
  report(right, "helpers block signals, and callers do not");
}

// The child has none of the helpers, and must neither wait for them nor ask a team of the parent's.
void check_fork() {
#if !defined(__SANITIZE_THREAD__)  // which has no threads in a forked child
  meet(3, [] {});
  const pid_t child = fork();
  if (child == 0) {
    alarm(20);
    in_pool = false;  // the pool serves all the same
    const int before = team_calls;
    const bool right = visits_all(100003, 1, 3) && meet(3, [] {}).size() == 3;
    _exit(right && team_calls == before ? 0 : 1);
  }
  int status = -1;
  waitpid(child, &status, 0);
  report(status == 0, "a forked child");
  report(visits_all(100003, 1, 3), "its parent");
#endif
}

}  // namespace

int main() {
  check_all(false);
  check_all(true);
  in_pool = true;
  check_absent_helpers();
  check_numbers_of_threads();
  check_signals();
  check_fork();
  std::printf("%d passed, %d failed\n", passed, failed);
  return failed ? 1 : 0;
}

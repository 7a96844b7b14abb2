// How a kernel's work is shared among threads.
//
// The caller's threading library gives a team: threads that are awake between calls, and a barrier at the end that
// waits for all of them. Each has a range of chunks and then takes what others have left, so that a thread that comes
// late, because another process has its core, has little to do. The barrier still waits for it to come.
//
// A forked child has none of its parent's threads, and its team may be theirs. There a pool of this library's own
// serves, whose helpers come or do not. Elsewhere it would be slower: after an operator of torch the team's threads
// keep their cores for some 10 ms to be ready for the next one (1.35 ms for a product of 4096 x 4096 after an operator,
// instead of 0.86).
#pragma once

#include "kernels.h"

namespace lowbit::cpu {

// Runs part(0) to part(parts - 1) at once, the first on the calling thread, and returns when all have returned.
using Team = std::function<void(int64_t parts, const std::function<void(int64_t part)>& part)>;

// Runs body(begin, end) on disjoint pieces of [0, count), at least `grain` long but for the last, on the calling thread
// and on up to threads - 1 others. Rethrows the first exception of a body once the other pieces are done. A body that
// calls this again runs that call on its own thread.
void share(int64_t count, int64_t grain, int64_t threads, const Team& team, const Body& body);

// The same by the pool, as share() does in a forked child.
void share_without_team(int64_t count, int64_t grain, int64_t threads, const Body& body);

}  // namespace lowbit::cpu

// How a kernel's work is shared among threads so that nobody waits for a thread that does not run.
//
// The caller's threading library gives a team: threads that are awake between calls, and a barrier at the end that
// waits for all of them. Where another process has one of their cores, that wait is a slice of the scheduler, 3 to 24
// ms for a product of 0.05. A call that waited so makes the library's waiting threads sleep for a while, by a second
// team. Where that does not help, the caller works with a pool of this library's own, whose helpers come or do not.
// Chunks are claimed one by one: the caller takes all that nobody else has claimed, and waits for claimed ones alone.
//
// The pool alone would be slower where nobody else is: after an operator of torch its threads keep their cores for some
// 10 ms to be ready for the next one, and helpers of another pool do not get them (1.35 ms for a product of 4096 x 4096
// after an operator, instead of 0.86).
#pragma once

#include "kernels.h"

namespace lowbit::cpu {

// Runs part(0) to part(parts - 1) at once, the first on the calling thread, and returns when all have returned.
using Team = std::function<void(int64_t parts, const std::function<void(int64_t part)>& part)>;

// Runs body(begin, end) on disjoint pieces of [0, count), at least `grain` long but for the last, on the calling thread
// and on up to threads - 1 others. Rethrows the first exception of a body once the other pieces are done. A body that
// calls this again runs that call on its own thread. In a forked child only the pool serves: a team's threads may be
// those of the parent.
void share(int64_t count, int64_t grain, int64_t threads, const Team& team, const Body& body);

}  // namespace lowbit::cpu

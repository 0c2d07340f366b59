// parallel_for: a small persistent pool of threads. Its own, because a second OpenMP runtime beside torch's would
// keep its threads spinning on the cores that torch wants.
#pragma once

#include <functional>

namespace flashcore {

// Calls task(0) .. task(count - 1), each once, on the calling thread and the pool's; returns when all are done.
void parallel_for(int count, const std::function<void(int)>& task);

}  // namespace flashcore

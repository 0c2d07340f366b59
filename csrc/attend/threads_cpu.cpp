// The pool behind parallel_for: one job at a time, tasks dealt by a counter, workers asleep in between.
#include "attend/threads_cpu.h"

#include <sched.h>
#include <unistd.h>

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>

namespace flashcore {
namespace {

int usable_cores() {
  cpu_set_t cores;
  return sched_getaffinity(0, sizeof(cores), &cores) == 0 ? CPU_COUNT(&cores) : 1;
}

class ThreadPool {
 public:
  ThreadPool() {
    for (int i = 1; i < usable_cores(); ++i) std::thread([this] { work(); }).detach();
  }

  void run(int count, const std::function<void(int)>& task) {
    const std::lock_guard one_job(job_mutex_);
    {
      const std::lock_guard lock(mutex_);
      task_ = &task;
      count_ = count;
      next_ = 0;
      ++generation_;
    }
    wake_.notify_all();
    for (int i; (i = next_++) < count;) task(i);
    std::unique_lock lock(mutex_);
    task_ = nullptr;  // a worker that wakes up late finds nothing
    done_.wait(lock, [this] { return busy_ == 0; });
  }

 private:
  void work() {
    uint64_t seen = 0;
    std::unique_lock lock(mutex_);
    while (true) {
      wake_.wait(lock, [&] { return generation_ != seen; });
      seen = generation_;
      if (!task_) continue;
      const std::function<void(int)>& task = *task_;
      const int count = count_;
      ++busy_;
      lock.unlock();
      for (int i; (i = next_++) < count;) task(i);
      lock.lock();
      if (--busy_ == 0) done_.notify_one();
    }
  }

  std::mutex job_mutex_, mutex_;
  std::condition_variable wake_, done_;
  const std::function<void(int)>* task_ = nullptr;
  int count_ = 0;
  int busy_ = 0;
  uint64_t generation_ = 0;
  std::atomic<int> next_ = 0;
};

// The threads of a pool do not survive fork(), so a child makes its own. Pools live as long as the process.
ThreadPool& pool() {
  static std::mutex mutex;
  static ThreadPool* instance = nullptr;
  static pid_t owner = 0;
  const std::lock_guard lock(mutex);
  if (owner != getpid()) {
    instance = new ThreadPool;
    owner = getpid();
  }
  return *instance;
}

}  // namespace

void parallel_for(int count, const std::function<void(int)>& task) {
  if (count <= 1) {
    for (int i = 0; i < count; ++i) task(i);
    return;
  }
  pool().run(count, task);
}

}  // namespace flashcore

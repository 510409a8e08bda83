// Loops of independent tasks on the threads of torch's OpenMP runtime.
#pragma once

#include <cstdint>
#include <functional>

namespace moe_lora {

using Task = std::function<void(int64_t)>;

// While it lives, loops that this thread starts run on at most so many threads.
class ThreadLimit {
 public:
  explicit ThreadLimit(int64_t limit);
  ~ThreadLimit();
  ThreadLimit(const ThreadLimit&) = delete;

 private:
  int64_t before;
};

// How many threads a loop would run on: the limit, or one where it can have no others.
int64_t threads();

// Every task once, each thread a run of them one after the other: for tasks that stream adjacent memory.
void runs(int64_t count, const Task& task);

// The same, each thread taking the next one: for few and unequal tasks.
void each(int64_t count, const Task& task);

}  // namespace moe_lora

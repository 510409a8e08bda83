// Loops of independent tasks on torch's threads. A task calls nothing of torch.
#pragma once

#include <cstdint>
#include <functional>

namespace moe_lora {

using Task = std::function<void(int64_t)>;

// How many threads a loop would run on: those of torch, or one where it can have no others.
int64_t threads();

// Every task once, each thread a run of them one after the other: for tasks that stream adjacent memory.
void runs(int64_t count, const Task& task);

// The same, each thread taking the next one: for few and unequal tasks.
void each(int64_t count, const Task& task);

}  // namespace moe_lora

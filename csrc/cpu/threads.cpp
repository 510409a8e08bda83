// Threads, and the memory that each keeps.
#include "threads.h"

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <exception>
#include <new>

#include "kernels.h"

// The OpenMP runtime that torch has loaded: GCC's, or another that offers the same entries. This library is linked with
// none, or it might bring a second pool of threads that competes with torch's.
extern "C" {
__attribute__((weak)) void GOMP_parallel(void (*run)(void*), void* data, unsigned threads, unsigned flags);
__attribute__((weak)) int omp_get_thread_num();
__attribute__((weak)) int omp_get_num_threads();
__attribute__((weak)) int omp_in_parallel();
}

namespace moe_lora {
namespace {

bool forked = false;  // a forked child has none of the runtime's threads, and would wait for them for ever

thread_local int64_t limit = 1;

[[maybe_unused]] const int watching = pthread_atfork(nullptr, nullptr, [] { forked = true; });

struct Region {
  const Task& part;
  int64_t count;
  std::atomic_flag failed = ATOMIC_FLAG_INIT;
  std::exception_ptr error;

  void run() {
    try {
      for (int64_t i = omp_get_thread_num(); i < count; i += omp_get_num_threads()) part(i);
    } catch (...) {
      if (!failed.test_and_set()) error = std::current_exception();
    }
  }
};

// Parts 0 .. count, at most threads() of them, each on its own thread; the first exception of one is thrown here.
void split(int64_t count, const Task& part) {
  if (count <= 1) {
    if (count) part(0);
    return;
  }
  Region region{part, count};
  GOMP_parallel([](void* data) { static_cast<Region*>(data)->run(); }, &region, unsigned(limit), 0);
  if (region.error) std::rethrow_exception(region.error);
}

}  // namespace

ThreadLimit::ThreadLimit(int64_t threads) : before(limit) { limit = threads; }
ThreadLimit::~ThreadLimit() { limit = before; }

int64_t threads() {
  return forked || !GOMP_parallel || omp_in_parallel() ? 1 : limit;
}

void runs(int64_t count, const Task& task) {
  const int64_t parts = std::min(count, threads());
  split(parts, [&](int64_t part) {
    for (int64_t i = part * count / parts, end = (part + 1) * count / parts; i < end; ++i) task(i);
  });
}

void each(int64_t count, const Task& task) {
  std::atomic<int64_t> next{0};
  split(std::min(count, threads()), [&](int64_t) {
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) task(i);
  });
}

void* scratch(int which, int64_t bytes) {
  constexpr std::align_val_t page{4096};
  struct Buffers {
    void* data[8] = {};
    int64_t bytes[8] = {};
    ~Buffers() {
      for (void* p : data) ::operator delete(p, page);
    }
  };
  static thread_local Buffers buffers;
  if (buffers.bytes[which] < bytes) {
    ::operator delete(buffers.data[which], page);
    buffers.data[which] = nullptr, buffers.bytes[which] = 0;
    buffers.data[which] = ::operator new(bytes, page);
    buffers.bytes[which] = bytes;
  }
  return buffers.data[which];
}

}  // namespace moe_lora

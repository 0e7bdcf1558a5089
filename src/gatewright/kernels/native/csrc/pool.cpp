#include "pool.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <c10/util/Exception.h>
#include <torch/library.h>

#include <sys/mman.h>

#include <cstdlib>
#include <list>
#include <map>
#include <mutex>
#include <new>
#include <unordered_map>

namespace gatewright {
namespace {

constexpr size_t kHuge = size_t{2} << 20, kSmall = size_t{64} << 10;

struct Free {
  void* block;
  size_t bytes;
};

// Freed blocks, oldest first; the oldest leave when more than `limit` bytes lie idle.
class Pool {
 public:
  void* allocate(size_t bytes) {
    bytes = rounded(bytes);
    {
      std::lock_guard<std::mutex> lock(mutex_);
      auto fit = idle_.lower_bound(bytes);
      if (fit != idle_.end() && fit->first <= bytes + bytes / 4) {
        auto place = fit->second;
        Free found = *place;
        forget(fit);
        held_[found.block] = found.bytes;
        return found.block;
      }
    }
    void* block = std::aligned_alloc(bytes >= kHuge ? kHuge : 64, bytes);
    if (block == nullptr) throw std::bad_alloc();
    if (bytes >= kHuge) madvise(block, bytes, MADV_HUGEPAGE);
    std::lock_guard<std::mutex> lock(mutex_);
    held_[block] = bytes;
    return block;
  }

  void give_back(void* block) {
    std::list<Free> leaving;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      auto found = held_.find(block);
      size_t bytes = found->second;
      held_.erase(found);
      order_.push_back({block, bytes});
      idle_.emplace(bytes, std::prev(order_.end()));
      idle_bytes_ += bytes;
      shrink(leaving);
    }
    for (auto& gone : leaving) std::free(gone.block);
  }

  // Returns the bytes that lie idle; a limit of 0 or more replaces the present one.
  int64_t limit(int64_t bytes) {
    std::list<Free> leaving;
    int64_t left;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      if (bytes >= 0) limit_ = static_cast<size_t>(bytes);
      shrink(leaving);
      left = static_cast<int64_t>(idle_bytes_);
    }
    for (auto& gone : leaving) std::free(gone.block);
    return left;
  }

 private:
  using Idle = std::multimap<size_t, std::list<Free>::iterator>;

  static size_t rounded(size_t bytes) {
    size_t step = bytes >= kHuge ? kHuge : bytes >= kSmall ? kSmall : 64;
    return (std::max<size_t>(bytes, 1) + step - 1) / step * step;
  }

  void forget(Idle::iterator entry) {
    idle_bytes_ -= entry->first;
    order_.erase(entry->second);
    idle_.erase(entry);
  }

  void shrink(std::list<Free>& leaving) {
    while (idle_bytes_ > limit_) {
      auto [first, last] = idle_.equal_range(order_.front().bytes);
      while (first != last && first->second != order_.begin()) ++first;
      leaving.push_back(order_.front());
      forget(first);
    }
  }

  std::mutex mutex_;
  std::unordered_map<void*, size_t> held_;
  std::list<Free> order_;
  Idle idle_;
  size_t idle_bytes_ = 0, limit_ = size_t{1} << 30;
};

// Never destroyed: tensors may outlive static objects.
Pool& pool() {
  static Pool* only = new Pool();
  return *only;
}

}  // namespace

void* pool_allocate(size_t bytes) { return pool().allocate(bytes); }
void pool_free(void* block) { pool().give_back(block); }

at::Tensor pooled_empty(at::IntArrayRef sizes, at::ScalarType dtype) {
  int64_t count = 1;
  for (int64_t size : sizes) count *= size;
  auto options = at::TensorOptions().dtype(dtype);
  const size_t bytes = static_cast<size_t>(count) * c10::elementSize(dtype);
  if (bytes < kSmall) return at::empty(sizes, options);
  return at::from_blob(pool().allocate(bytes), sizes, [](void* block) { pool().give_back(block); }, options);
}

TORCH_LIBRARY_FRAGMENT(gatewright, m) {
  m.def("pool_limit(int bytes) -> int", [](int64_t bytes) { return pool().limit(bytes); });
}

}  // namespace gatewright

// Blocks of memory that are kept when freed: fresh pages cost more than the arithmetic on them.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstddef>
#include <memory>

namespace gatewright {

// Returns a block of at least `bytes`, aligned to 64; give it back with pool_free.
void* pool_allocate(size_t bytes);
void pool_free(void* block);

struct PoolDeleter {
  void operator()(void* block) const { pool_free(block); }
};

// A block for the time of a call.
class Scratch {
 public:
  explicit Scratch(size_t bytes) : block_(pool_allocate(bytes)) {}
  template <class T>
  T* as() const { return static_cast<T*>(block_.get()); }

 private:
  std::unique_ptr<void, PoolDeleter> block_;
};

// Returns an uninitialised contiguous tensor whose memory goes back to the pool with its last reference.
at::Tensor pooled_empty(at::IntArrayRef sizes, at::ScalarType dtype);

}  // namespace gatewright

// Where the gradients of one expert's weights are summed, and how the parts of an expert come together.
#pragma once

#include <array>
#include <memory>
#include <vector>

#include "experts.h"

namespace gatewright {

// fp32 sums of one task, in the order w_in, w_down, b_in, b_down; null where there is none.
using Sums = std::array<float*, 4>;

// Hands every task its sums: the fp32 gradient itself for an expert's first or only task, a block of its own
// where parts must be added up, the thread's block where the result is only to be narrowed to W.
template <class W>
class WeightSums {
 public:
  WeightSums(const Sizes& s, const std::vector<Task>& tasks, const Gradients& out)
      : sizes_{s.H * s.D, s.D * s.F, out.b_in.defined() ? s.H : 0, out.b_down.defined() ? s.D : 0},
        outs_{base(out.w_in), base(out.w_down), base(out.b_in), base(out.b_down)}, parts_(s.E), first_(s.E) {
    for (int64_t size : sizes_) room_ += round_up(size, 16);
    for (const Task& task : tasks) ++parts_[task.expert];
    int64_t blocks = 0;
    for (int64_t e = 0; e < s.E; ++e) {
      first_[e] = blocks - kInPlace;
      if (parts_[e] > 1) blocks += parts_[e] - kInPlace;
    }
    blocks_ = std::make_unique<Scratch>(std::max<int64_t>(blocks, 1) * room_ * sizeof(float));
  }

  // Floats that each thread provides for `of`.
  int64_t thread_room() const { return kInPlace ? 0 : room_; }

  Sums of(const Task& task, float* thread_block) const {
    Sums sums{};
    const bool divided = parts_[task.expert] > 1;
    if (kInPlace && task.part == 0) {
      for (int i = 0; i < 4; ++i)
        if (sizes_[i]) sums[i] = reinterpret_cast<float*>(outs_[i]) + task.expert * sizes_[i];
    } else {
      float* next = divided ? block(task.expert, task.part) : thread_block;
      for (int i = 0; i < 4; ++i) {
        if (sizes_[i]) sums[i] = next;
        next += round_up(sizes_[i], 16);
      }
    }
    return sums;
  }

  // Narrows the sums of a task that has its expert alone.
  void finish(const Task& task, const Sums& sums) const {
    if (kInPlace || parts_[task.expert] > 1) return;
    for (int i = 0; i < 4; ++i) {
      W* to = outs_[i] + task.expert * sizes_[i];
      for (int64_t j = 0; j < sizes_[i]; ++j) to[j] = narrow<W>(sums[i][j]);
    }
  }

  // Adds up the parts of divided experts, in order, and zeroes what belongs to experts without rows.
  void close() const {
    constexpr int64_t kSlice = 1 << 14;
    const int64_t slices = (room_ + kSlice - 1) / kSlice + 4, experts = static_cast<int64_t>(parts_.size());
    bool any = false;
    for (int64_t parts : parts_) any = any || parts != 1;
    if (!any) return;
    run_tasks(experts * slices, threads_for(experts * slices), [&](int64_t job, int) {
      const int64_t e = job / slices;
      if (parts_[e] == 1) return;
      int64_t slice = job % slices, offset = 0;
      for (int i = 0; i < 4; ++i) {
        const int64_t own = (sizes_[i] + kSlice - 1) / kSlice;
        if (slice < own) return add_up(e, i, offset, slice * kSlice, std::min(sizes_[i], (slice + 1) * kSlice));
        slice -= own;
        offset += round_up(sizes_[i], 16);
      }
    });
  }

 private:
  // Whether the first part may be summed in the gradient itself.
  static constexpr int64_t kInPlace = std::is_same_v<W, float> ? 1 : 0;

  static W* base(const at::Tensor& out) { return out.defined() ? data<W>(out) : nullptr; }
  float* block(int64_t expert, int64_t part) const {
    return blocks_->template as<float>() + (first_[expert] + part) * room_;
  }

  void add_up(int64_t e, int i, int64_t offset, int64_t begin, int64_t end) const {
    W* to = outs_[i] + e * sizes_[i];
    if (parts_[e] == 0) {
      std::memset(static_cast<void*>(to + begin), 0, (end - begin) * sizeof(W));
      return;
    }
    float total[256];
    for (int64_t from = begin; from < end; from += 256) {
      const int64_t count = std::min<int64_t>(256, end - from);
      for (int64_t j = 0; j < count; ++j) total[j] = kInPlace ? widen(to[from + j]) : 0.0f;
      for (int64_t part = kInPlace; part < parts_[e]; ++part) {
        const float* more = block(e, part) + offset + from;
        for (int64_t j = 0; j < count; ++j) total[j] += more[j];
      }
      for (int64_t j = 0; j < count; ++j) to[from + j] = narrow<W>(total[j]);
    }
  }

  std::array<int64_t, 4> sizes_;
  std::array<W*, 4> outs_;
  std::vector<int64_t> parts_, first_;
  std::unique_ptr<Scratch> blocks_;
  int64_t room_ = 0;
};

}  // namespace gatewright

// The experts' backward pass. One task takes an expert's rows through all of it: what the activation gives
// back never leaves the caches, and only x and the pre-activations are read from memory.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <tuple>

#include "activations.h"
#include "experts.h"
#include "sums.h"

namespace gatewright {
namespace {

template <class T, class W, class Act>
class Backward {
 public:
  Backward(const Inputs& in, const Sizes& s, const at::Tensor& grad_y, const at::Tensor& pre, bool need_x,
           bool need_weights, Gradients& out)
      : in_(in), s_(s), out_(out), grad_y_(data<T>(grad_y)), pre_(data<T>(pre)), need_x_(need_x),
        need_weights_(need_weights), need_rows_(need_x || in.weigh_input), width_(round_up(s.D, per_unit<T>)),
        pre_width_(round_up(s.H, per_unit<T>)), rows_(std::min(kPanel, round_up(s.M, 8))), row_weights_(s.M * sizeof(float)),
        of_weights_(s.M * sizeof(float)), grad_rows_(need_x && s.K != 1 ? s.M * s.D * sizeof(T) : 0),
        grad_x_(need_x ? data<T>(out.x) : nullptr) {
    const int64_t units = rows_ / per_unit<T>;
    g_at_ = layout_.add<T>(rows_ * width_);
    x_at_ = layout_.add<T>(rows_ * width_);
    pre_at_ = layout_.add<T>(rows_ * pre_width_);
    hidden_at_ = layout_.add<T>(rows_ * s.F);
    float_at_ = layout_.add<float>(rows_ * std::max(s.F, s.D));
    units_at_ = layout_.add<uint32_t>(units * std::max({s.D, s.H, s.F}));
    turned_at_ = layout_.add<uint32_t>(units * std::max(s.D, s.H));
    w_down_at_ = layout_.add<uint32_t>(is_bf16<T> ? width_ / 2 * s.F : 0);
    w_in_at_ = layout_.add<uint32_t>(is_bf16<T> ? pre_width_ / 2 * s.D : 0);
  }

  void run() {
    weights_of_rows(in_, s_, row_weights_.as<float>());
    const auto tasks = tasks_of(in_.counts, std::max<int64_t>(256, round_up(s_.M / 8, 64)));
    const int threads = threads_for(tasks.size());
    std::unique_ptr<WeightSums<W>> sums;
    if (need_weights_) {
      sums = std::make_unique<WeightSums<W>>(s_, tasks, out_);
      sums_at_ = layout_.add<float>(sums->thread_room());
    }
    Scratch scratch(layout_.size() * threads);
    if (need_x_ && s_.K == 1 && s_.M < s_.T) std::memset(static_cast<void*>(grad_x_), 0, s_.T * s_.D * sizeof(T));
    run_tasks(tasks.size(), threads, [&](int64_t number, int thread) {
      const Task& task = tasks[number];
      char* block = scratch.as<char>() + thread * layout_.size();
      Sums own{};
      if (sums) own = sums->of(task, reinterpret_cast<float*>(block + sums_at_));
      compute(task, block, own);
      if (sums) sums->finish(task, own);
      end_of_multiplying();
    });
    if (sums) sums->close();
    if (need_x_ && s_.K != 1) gather_sum<T>(grad_rows_.template as<T>(), in_.slots, s_, grad_x_);
    const int64_t* slots = data<int64_t>(in_.slots);
    float* of_weights = data<float>(out_.combine_weights);
    for (int64_t i = 0; i < s_.T * s_.K; ++i)
      of_weights[i] = slots[i] < 0 ? 0.0f : of_weights_.as<float>()[slots[i]];
  }

 private:
  void compute(const Task& task, char* block, const Sums& sums) const {
    const int64_t D = s_.D, H = s_.H, F = s_.F;
    T* g = reinterpret_cast<T*>(block + g_at_);
    T* x = reinterpret_cast<T*>(block + x_at_);
    T* grad_pre = reinterpret_cast<T*>(block + pre_at_);
    T* hidden = reinterpret_cast<T*>(block + hidden_at_);
    float* numbers = reinterpret_cast<float*>(block + float_at_);
    uint32_t* units = reinterpret_cast<uint32_t*>(block + units_at_);
    uint32_t* turned = reinterpret_cast<uint32_t*>(block + turned_at_);
    const uint32_t* w_down = pack_rows<T, W>(data<W>(in_.w_down) + task.expert * D * F, D, F,
                                             reinterpret_cast<uint32_t*>(block + w_down_at_));
    const uint32_t* w_in = pack_rows<T, W>(data<W>(in_.w_in) + task.expert * H * D, H, D,
                                           reinterpret_cast<uint32_t*>(block + w_in_at_));
    const int64_t* tokens = data<int64_t>(in_.token_ids);
    const int64_t step = even_panels(task.end - task.begin, rows_);
    for (int64_t begin = task.begin; begin < task.end; begin += step) {
      const int64_t rows = std::min(step, task.end - begin), padded = round_up(rows, 8);
      const bool add = begin != task.begin;
      for (int64_t r = 0; r < rows; ++r) take_row(grad_y_ + tokens[begin + r] * D, D, 1.0f, g + r * width_, width_);
      clear_rows(g, width_, rows, padded);
      multiply(padded, F, width_, g, width_, w_down, F, numbers, F, false);
      for (int64_t r = 0; r < rows; ++r)
        through_activation(task.expert, begin + r, g + r * width_, numbers + r * F, grad_pre + r * pre_width_,
                           hidden + r * F);
      clear_rows(grad_pre, pre_width_, rows, padded);
      clear_rows(hidden, F, rows, padded);
      if (sums[2]) add_rows(grad_pre, pre_width_, rows, H, nullptr, sums[2], add);
      if (sums[3]) add_rows(g, width_, rows, D, in_.weigh_input ? nullptr : row_weights_.as<float>() + begin, sums[3], add);
      for (int64_t r = 0; r < rows; ++r) {
        const float scale = weight_or_one(row_weights_.as<float>(), begin + r, in_.weigh_input);
        take_row(data<T>(in_.x) + tokens[begin + r] * D, D, scale, x + r * width_, width_);
      }
      clear_rows(x, width_, rows, padded);
      if (need_weights_) {
        // Both left-hand sides are turned on their side: rows of numbers become columns of units.
        const int64_t deep = padded / per_unit<T>, ld = rows_ / per_unit<T>;
        transpose_units(units_of(g, width_, padded, D, units), is_bf16<T> ? D : width_, deep, D, turned, ld);
        multiply(D, F, padded, reinterpret_cast<const T*>(turned), rows_, units_of(hidden, F, padded, F, units), F,
                 sums[1], F, add);
        transpose_units(units_of(grad_pre, pre_width_, padded, H, units), is_bf16<T> ? H : pre_width_, deep, H, turned, ld);
        multiply(H, D, padded, reinterpret_cast<const T*>(turned), rows_, units_of(x, width_, padded, D, units),
                 is_bf16<T> ? D : width_, sums[0], D, add);
      }
      if (need_rows_) {
        multiply(padded, D, pre_width_, grad_pre, pre_width_, w_in, D, numbers, D, false);
        for (int64_t r = 0; r < rows; ++r) store(begin + r, numbers + r * D);
      }
    }
  }

  // From the gradient of a row's hidden numbers to that of its pre-activations; leaves its hidden numbers too.
  void through_activation(int64_t expert, int64_t row, const T* g, const float* grad_hidden, T* grad_pre,
                          T* hidden) const {
    const float weight = weight_or_one(row_weights_.as<float>(), row, !in_.weigh_input);
    const T* a = pre_ + row * s_.H;
    const T* scale = data<T>(in_.hidden_scale);
    float dot = scale ? slopes<true>(a, weight, scale + row * s_.F, grad_hidden, grad_pre, hidden)
                      : slopes<false>(a, weight, nullptr, grad_hidden, grad_pre, hidden);
    for (int64_t j = s_.H; j < pre_width_; ++j) grad_pre[j] = narrow<T>(0.0f);
    if (in_.weigh_input) return;
    if (const W* bias = data<W>(in_.b_down)) {
      bias += expert * s_.D;
#pragma omp simd reduction(+ : dot)
      for (int64_t j = 0; j < s_.D; ++j) dot += widen(g[j]) * widen(bias[j]);
    }
    of_weights_.as<float>()[row] = dot;
  }

  template <bool kScaled>
  float slopes(const T* __restrict a, float weight, const T* __restrict scale, const float* __restrict grad_hidden,
               T* __restrict grad_pre, T* __restrict hidden) const {
    const int64_t F = s_.F;
    float dot = 0.0f;
#pragma omp simd reduction(+ : dot)
    for (int64_t j = 0; j < F; ++j) {
      const float s = kScaled ? widen(scale[j]) : 1.0f;
      const float through = grad_hidden[j] * weight * s;
      float value;
      if constexpr (Act::gated) {
        float of_gate, of_up;
        value = Act::slopes(widen(a[j]), widen(a[F + j]), of_gate, of_up);
        grad_pre[j] = narrow<T>(through * of_gate);
        grad_pre[F + j] = narrow<T>(through * of_up);
      } else {
        float slope;
        value = Act::both(widen(a[j]), slope);
        grad_pre[j] = narrow<T>(through * slope);
      }
      dot += grad_hidden[j] * value * s;
      hidden[j] = narrow<T>(value * s * weight);
    }
    return dot;
  }

  static void add_rows(const T* rows, int64_t ld, int64_t count, int64_t n, const float* weights, float* sums, bool add) {
    if (!add) std::fill(sums, sums + n, 0.0f);
    for (int64_t r = 0; r < count; ++r) {
      const float weight = weights ? weights[r] : 1.0f;
      for (int64_t j = 0; j < n; ++j) sums[j] += widen(rows[r * ld + j]) * weight;
    }
  }

  void store(int64_t row, const float* found) const {
    const int64_t D = s_.D, token = data<int64_t>(in_.token_ids)[row];
    const float scale = weight_or_one(row_weights_.as<float>(), row, in_.weigh_input);
    if (in_.weigh_input) {
      const T* x = data<T>(in_.x) + token * D;
      float dot = 0.0f;
#pragma omp simd reduction(+ : dot)
      for (int64_t j = 0; j < D; ++j) dot += found[j] * widen(x[j]);
      of_weights_.as<float>()[row] = dot;
    }
    if (!need_x_) return;
    T* to = s_.K == 1 ? grad_x_ + token * D : grad_rows_.template as<T>() + row * D;
    for (int64_t j = 0; j < D; ++j) to[j] = narrow<T>(found[j] * scale);
  }

  const Inputs& in_;
  const Sizes s_;
  Gradients& out_;
  const T *grad_y_, *pre_;
  const bool need_x_, need_weights_, need_rows_;
  const int64_t width_, pre_width_, rows_;
  Scratch row_weights_, of_weights_, grad_rows_;
  T* grad_x_;
  Layout layout_;
  size_t g_at_, x_at_, pre_at_, hidden_at_, float_at_, units_at_, turned_at_, w_down_at_, w_in_at_, sums_at_ = 0;
};

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> experts_backward(
    const at::Tensor& grad_y, const at::Tensor& pre, bool need_x, bool need_weights, const at::Tensor& x,
    const at::Tensor& combine_weights, const at::Tensor& w_in, const at::Tensor& w_down,
    const std::optional<at::Tensor>& b_in, const std::optional<at::Tensor>& b_down,
    const std::optional<at::Tensor>& hidden_scale, const at::Tensor& token_ids, const at::Tensor& counts,
    const at::Tensor& slots, c10::string_view activation, bool weigh_input) {
  Inputs in{x, combine_weights, w_in, w_down, b_in, b_down, hidden_scale, token_ids, counts, slots, weigh_input};
  const Gradients out = backward_of(in, grad_y, pre, need_x, need_weights, activation);
  auto or_none = [&](const at::Tensor& found) { return found.defined() ? found : at::empty({0}, x.options()); };
  return {or_none(out.x), out.combine_weights, or_none(out.w_in), or_none(out.w_down), or_none(out.b_in),
          or_none(out.b_down)};
}

}  // namespace

Gradients backward_of(const Inputs& in, const at::Tensor& grad_y, const at::Tensor& pre, bool need_x, bool need_weights,
                      c10::string_view activation) {
  const at::Tensor& x = in.x;
  Gradients out;
  with_activation(activation, [&](auto act) {
    using Act = decltype(act);
    const Sizes s = check(in, Act::gated);
    TORCH_CHECK_VALUE(grad_y.sizes() == x.sizes() && grad_y.is_contiguous() && grad_y.scalar_type() == x.scalar_type(),
                      "grad_y is not contiguous, of x's shape and dtype");
    TORCH_CHECK_VALUE(pre.dim() == 2 && pre.size(0) >= s.M && pre.size(1) == s.H && pre.is_contiguous() &&
                          pre.scalar_type() == x.scalar_type(), "pre is not [M, H] of x's dtype");
    if (need_x) out.x = pooled_empty({s.T, s.D}, x.scalar_type());
    out.combine_weights = pooled_empty({s.T, s.K}, at::kFloat);
    if (need_weights) {
      out.w_in = pooled_empty(in.w_in.sizes(), in.w_in.scalar_type());
      out.w_down = pooled_empty(in.w_down.sizes(), in.w_down.scalar_type());
      if (in.b_in) out.b_in = pooled_empty(in.b_in->sizes(), in.b_in->scalar_type());
      if (in.b_down) out.b_down = pooled_empty(in.b_down->sizes(), in.b_down->scalar_type());
    }
    with_dtypes(x.scalar_type(), in.w_in.scalar_type(), [&]<class T, class W>() {
      Backward<T, W, Act>(in, s, grad_y, pre, need_x, need_weights, out).run();
    });
  });
  return out;
}

TORCH_LIBRARY_FRAGMENT(gatewright, m) {
  m.def(
      "experts_backward(Tensor grad_y, Tensor pre, bool need_x, bool need_weights, Tensor x, Tensor combine_weights, "
      "Tensor w_in, Tensor w_down, Tensor? b_in, Tensor? b_down, Tensor? hidden_scale, Tensor token_ids, "
      "Tensor counts, Tensor slots, str activation, bool weigh_input) -> "
      "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(gatewright, CPU, m) { m.impl("experts_backward", experts_backward); }

}  // namespace gatewright

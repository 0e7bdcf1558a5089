// The experts' forward pass: gather rows, both matmuls with the activation between them, combine.
#include <torch/library.h>

#include <tuple>

#include "activations.h"
#include "experts.h"

namespace gatewright {
namespace {

template <class T, class W, class Act>
class Forward {
 public:
  Forward(const Inputs& in, const Sizes& s, bool keep, at::Tensor& y, at::Tensor& pre)
      : in_(in), s_(s), pre_(keep ? data<T>(pre) : nullptr), y_(data<T>(y)),
        width_(round_up(s.D, per_unit<T>)), hidden_width_(round_up(s.F, per_unit<T>)),
        rows_(std::min(kPanel, round_up(s.M, 8))), row_weights_(s.M * sizeof(float)),
        out_(s.K == 1 ? 0 : s.M * s.D * sizeof(T)) {
    x_at_ = layout_.add<T>(rows_ * width_);
    first_at_ = layout_.add<float>(rows_ * s.H);
    hidden_at_ = layout_.add<T>(rows_ * hidden_width_);
    second_at_ = layout_.add<float>(rows_ * s.D);
    w_in_at_ = layout_.add<uint32_t>(width_ / per_unit<T> * spread(s.H));
    w_down_at_ = layout_.add<uint32_t>(hidden_width_ / per_unit<T> * spread(s.D));
  }

  void run() {
    weights_of_rows(in_, s_, row_weights_.as<float>());
    // The one expert of a dense layer has many tasks: its weights are packed once for all of them.
    Scratch packed(s_.E == 1 ? layout_.size() : 0);
    if (s_.E == 1) pack(0, once_ = packed.as<char>());
    const auto tasks = tasks_of(in_.counts, std::max<int64_t>(256, s_.M / 16));
    const int threads = threads_for(tasks.size());
    Scratch scratch(layout_.size() * threads);
    // With one place per token a row is its token's whole output.
    if (s_.K == 1 && s_.M < s_.T) std::memset(static_cast<void*>(y_), 0, s_.T * s_.D * sizeof(T));
    run_tasks(tasks.size(), threads, [&](int64_t task, int thread) {
      compute(tasks[task], scratch.as<char>() + thread * layout_.size());
      end_of_multiplying();
      end_of_streaming();
    });
    if (s_.K != 1) gather_sum<T>(out_.template as<T>(), in_.slots, s_, y_);
  }

 private:
  void compute(const Task& task, char* block) const {
    const auto [T_, D, H, F, E, K, M] = s_;
    T* x = reinterpret_cast<T*>(block + x_at_);
    float* first = reinterpret_cast<float*>(block + first_at_);
    T* hidden = reinterpret_cast<T*>(block + hidden_at_);
    float* second = reinterpret_cast<float*>(block + second_at_);
    if (once_ == nullptr) pack(task.expert, block);
    const char* weights = once_ ? once_ : block;
    const uint32_t* w_in = reinterpret_cast<const uint32_t*>(weights + w_in_at_);
    const uint32_t* w_down = reinterpret_cast<const uint32_t*>(weights + w_down_at_);
    const int64_t step = even_panels(task.end - task.begin, rows_);
    for (int64_t begin = task.begin; begin < task.end; begin += step) {
      const int64_t rows = std::min(step, task.end - begin), padded = round_up(rows, 8);
      gather(begin, rows, x);
      clear_rows(x, width_, rows, padded);
      multiply(padded, H, width_, x, width_, w_in, spread(H), first, H, false);
      for (int64_t r = 0; r < rows; ++r) activate(task.expert, begin + r, first + r * H, hidden + r * hidden_width_);
      clear_rows(hidden, hidden_width_, rows, padded);
      multiply(padded, D, hidden_width_, hidden, hidden_width_, w_down, spread(D), second, D, false);
      for (int64_t r = 0; r < rows; ++r) store(task.expert, begin + r, second + r * D);
    }
  }

  void pack(int64_t expert, char* block) const {
    const int64_t D = s_.D, H = s_.H, F = s_.F;
    pack_transposed<T, W>(data<W>(in_.w_in) + expert * H * D, H, D, reinterpret_cast<uint32_t*>(block + w_in_at_), spread(H));
    pack_transposed<T, W>(data<W>(in_.w_down) + expert * D * F, D, F, reinterpret_cast<uint32_t*>(block + w_down_at_), spread(D));
  }

  void gather(int64_t begin, int64_t rows, T* x) const {
    const int64_t* tokens = data<int64_t>(in_.token_ids);
    const float* weights = row_weights_.as<float>();
    for (int64_t r = 0; r < rows; ++r) {
      const float scale = weight_or_one(weights, begin + r, in_.weigh_input);
      take_row(data<T>(in_.x) + tokens[begin + r] * s_.D, s_.D, scale, x + r * width_, width_);
    }
  }

  // Keeps the pre-activations of a row and turns them into its hidden numbers, the combine weight folded in.
  void activate(int64_t expert, int64_t row, float* a, T* hidden) const {
    const int64_t H = s_.H, F = s_.F;
    if (const W* bias = data<W>(in_.b_in)) {
      bias += expert * H;
      for (int64_t j = 0; j < H; ++j) a[j] += widen(bias[j]);
    }
    if (pre_ != nullptr) stream_row(a, H, pre_ + row * H);
    const float weight = weight_or_one(row_weights_.as<float>(), row, !in_.weigh_input);
    if (const T* scale = data<T>(in_.hidden_scale)) {
      scale += row * F;
      for (int64_t j = 0; j < F; ++j) hidden[j] = narrow<T>(value(a, j) * widen(scale[j]) * weight);
    } else {
      for (int64_t j = 0; j < F; ++j) hidden[j] = narrow<T>(value(a, j) * weight);
    }
    for (int64_t j = F; j < hidden_width_; ++j) hidden[j] = narrow<T>(0.0f);
  }

  float value(const float* a, int64_t j) const {
    if constexpr (Act::gated) return Act::value(a[j], a[s_.F + j]);
    else return Act::value(a[j]);
  }

  void store(int64_t expert, int64_t row, float* result) const {
    if (const W* bias = data<W>(in_.b_down)) {
      bias += expert * s_.D;
      const float weight = weight_or_one(row_weights_.as<float>(), row, !in_.weigh_input);
      for (int64_t j = 0; j < s_.D; ++j) result[j] += widen(bias[j]) * weight;
    }
    T* to = s_.K == 1 ? y_ + data<int64_t>(in_.token_ids)[row] * s_.D : out_.template as<T>() + row * s_.D;
    for (int64_t j = 0; j < s_.D; ++j) to[j] = narrow<T>(result[j]);
  }

  const Inputs& in_;
  const Sizes s_;
  T *pre_, *y_;
  const int64_t width_, hidden_width_, rows_;
  Scratch row_weights_, out_;
  Layout layout_;
  size_t x_at_, first_at_, hidden_at_, second_at_, w_in_at_, w_down_at_;
  char* once_ = nullptr;
};

std::tuple<at::Tensor, at::Tensor> experts_forward(
    const at::Tensor& x, const at::Tensor& combine_weights, const at::Tensor& w_in, const at::Tensor& w_down,
    const std::optional<at::Tensor>& b_in, const std::optional<at::Tensor>& b_down,
    const std::optional<at::Tensor>& hidden_scale, const at::Tensor& token_ids, const at::Tensor& counts,
    const at::Tensor& slots, c10::string_view activation, bool weigh_input, bool keep) {
  return forward_of({x, combine_weights, w_in, w_down, b_in, b_down, hidden_scale, token_ids, counts, slots, weigh_input},
                    activation, keep);
}

}  // namespace

std::tuple<at::Tensor, at::Tensor> forward_of(const Inputs& in, c10::string_view activation, bool keep) {
  at::Tensor y, pre;
  with_activation(activation, [&](auto act) {
    using Act = decltype(act);
    const Sizes s = check(in, Act::gated);
    y = pooled_empty({s.T, s.D}, in.x.scalar_type());
    pre = pooled_empty({keep ? in.token_ids.size(0) : 0, s.H}, in.x.scalar_type());
    with_dtypes(in.x.scalar_type(), in.w_in.scalar_type(), [&]<class T, class W>() {
      Forward<T, W, Act>(in, s, keep, y, pre).run();
    });
  });
  return {y, pre};
}

TORCH_LIBRARY_FRAGMENT(gatewright, m) {
  m.def(
      "experts_forward(Tensor x, Tensor combine_weights, Tensor w_in, Tensor w_down, Tensor? b_in, Tensor? b_down, "
      "Tensor? hidden_scale, Tensor token_ids, Tensor counts, Tensor slots, str activation, bool weigh_input, "
      "bool keep) -> (Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(gatewright, CPU, m) { m.impl("experts_forward", experts_forward); }

}  // namespace gatewright

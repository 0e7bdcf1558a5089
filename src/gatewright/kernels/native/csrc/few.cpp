// A few tokens: experts and linear maps by dot products that read each weight once, at the pace of the memory.
#include <torch/library.h>

#include <vector>

#include "activations.h"
#include "dots.h"
#include "experts.h"

namespace gatewright {
namespace {

// Rows of a matrix that one task takes, in each half of a gated one. The cut depends on sizes alone.
constexpr int64_t kRowsOfTask = 16;

inline int64_t pieces(int64_t size) { return (size + kRowsOfTask - 1) / kRowsOfTask; }

// Consecutive rows of one expert, all of them.
struct Group {
  int64_t expert, begin, count;
};

template <class T, class W, class Act>
class FewRows {
  using P = typename Panel<T, W>::type;
  using B = std::conditional_t<std::is_same_v<W, int8_t>, float, W>;  // of biases

 public:
  FewRows(const Inputs& in, const Maybe& s_in, const Maybe& s_down, const Sizes& s, at::Tensor& y)
      : in_(in), s_(s), scale_in_(data<float>(s_in)), scale_down_(data<float>(s_down)), y_(data<T>(y)),
        width_(round_up(s.D, kPadding)), hidden_width_(round_up(s.F, kPadding)), row_weights_(s.M * sizeof(float)),
        x_(s.M * width_ * sizeof(P)), hidden_(s.M * hidden_width_ * sizeof(P)) {}

  void run() {
    const int64_t *counts = data<int64_t>(in_.counts), *tokens = data<int64_t>(in_.token_ids);
    weights_of_rows(in_, s_, row_weights_.as<float>());
    for (int64_t e = 0, begin = 0; e < s_.E; begin += counts[e], ++e)
      if (counts[e] > 0) groups_.push_back({e, begin, counts[e]});
    for (int64_t row = 0; row < s_.M; ++row) {
      const float scale = weight_or_one(row_weights_.as<float>(), row, in_.weigh_input);
      lay_out(data<T>(in_.x) + tokens[row] * s_.D, s_.D, scale, x_.as<P>() + row * width_, width_);
      clear_rows(hidden_.as<P>() + row * hidden_width_ + s_.F, 1, 0, hidden_width_ - s_.F);
    }
    const int64_t per_group = pieces(s_.F), first = groups_.size() * per_group, second = pieces(s_.D);
    run_two(first, second, threads_for(std::max(first, second)),
            [&](int64_t task) { fill_hidden(groups_[task / per_group], task % per_group * kRowsOfTask); },
            [&](int64_t task) { fill_y(task * kRowsOfTask); });
  }

 private:
  // Hidden numbers begin .. begin + kRowsOfTask of an expert's rows, the combine weight folded in.
  void fill_hidden(const Group& group, int64_t begin) const {
    const int64_t end = std::min(begin + kRowsOfTask, s_.F);
    for (int64_t at = 0; at < group.count; at += kFew) {
      const int64_t row = group.begin + at;
      with_rows(std::min(kFew, group.count - at), [&]<int kRows>() {
        constexpr int wide = Act::gated ? kSide<kRows> / 2 : kSide<kRows>;
        int64_t unit = begin;
        for (; unit + wide <= end; unit += wide) hidden_units<kRows, wide>(group.expert, row, unit);
        for (; unit < end; ++unit) hidden_units<kRows, 1>(group.expert, row, unit);
      });
    }
  }

  template <int kRows, int kUnits>
  void hidden_units(int64_t expert, int64_t row, int64_t unit) const {
    constexpr int halves = Act::gated ? 2 : 1;
    const W *base = data<W>(in_.w_in) + expert * s_.H * s_.D, *w[halves * kUnits];
    for (int half = 0; half < halves; ++half)
      for (int j = 0; j < kUnits; ++j) w[half * kUnits + j] = base + (half * s_.F + unit + j) * s_.D;
    float sums[halves * kUnits * kFew];
    dots<kRows, halves * kUnits>(x_.as<P>() + row * width_, width_, w, s_.D, kUnits * s_.D, sums);
    const int64_t own = expert * s_.H + unit;
    for (int half = 0; half < halves; ++half)
      for (int j = 0; j < kUnits; ++j)
        for (int r = 0; r < kRows; ++r)
          finish(sums[(half * kUnits + j) * kFew + r], scale_in_, data<B>(in_.b_in), own + half * s_.F + j, 1.0f);
    for (int j = 0; j < kUnits; ++j)
      for (int r = 0; r < kRows; ++r) {
        float value;
        if constexpr (Act::gated) value = Act::value(sums[j * kFew + r], sums[(kUnits + j) * kFew + r]);
        else value = Act::value(sums[j * kFew + r]);
        value *= weight_or_one(row_weights_.as<float>(), row + r, !in_.weigh_input);
        // Through T: what the other paths hand to the second matrix.
        hidden_.as<P>()[(row + r) * hidden_width_ + unit + j] = narrow<P>(widen(narrow<T>(value)));
      }
  }

  static void finish(float& sum, const float* scale, const B* bias, int64_t place, float weight) {
    if (scale != nullptr) sum *= scale[place];
    if (bias != nullptr) sum += widen(bias[place]) * weight;
  }

  // Columns begin .. begin + kRowsOfTask of y; an expert's part of a token is added in the order of experts.
  void fill_y(int64_t begin) const {
    const int64_t end = std::min(begin + kRowsOfTask, s_.D);
    std::vector<float> sums(s_.T * kRowsOfTask, 0.0f);
    for (const Group& group : groups_)
      for (int64_t at = 0; at < group.count; at += kFew) {
        const int64_t row = group.begin + at;
        with_rows(std::min(kFew, group.count - at), [&]<int kRows>() {
          constexpr int wide = kSide<kRows>;
          int64_t column = begin;
          for (; column + wide <= end; column += wide)
            add_columns<kRows, wide>(group.expert, row, column, sums.data() + column - begin);
          for (; column < end; ++column)
            add_columns<kRows, 1>(group.expert, row, column, sums.data() + column - begin);
        });
      }
    for (int64_t t = 0; t < s_.T; ++t)
      for (int64_t column = begin; column < end; ++column)
        y_[t * s_.D + column] = narrow<T>(sums[t * kRowsOfTask + column - begin]);
  }

  template <int kRows, int kColumns>
  void add_columns(int64_t expert, int64_t row, int64_t column, float* to) const {
    const W* w[kColumns];
    for (int j = 0; j < kColumns; ++j) w[j] = data<W>(in_.w_down) + (expert * s_.D + column + j) * s_.F;
    float sums[kColumns * kFew];
    dots<kRows, kColumns>(hidden_.as<P>() + row * hidden_width_, hidden_width_, w, s_.F, kColumns * s_.F, sums);
    for (int r = 0; r < kRows; ++r) {
      const float weight = weight_or_one(row_weights_.as<float>(), row + r, !in_.weigh_input);
      float* token = to + data<int64_t>(in_.token_ids)[row + r] * kRowsOfTask;
      for (int j = 0; j < kColumns; ++j) {
        finish(sums[j * kFew + r], scale_down_, data<B>(in_.b_down), expert * s_.D + column + j, weight);
        token[j] += sums[j * kFew + r];
      }
    }
  }

  const Inputs& in_;
  const Sizes s_;
  const float *scale_in_, *scale_down_;
  T* y_;
  const int64_t width_, hidden_width_;
  Scratch row_weights_, x_, hidden_;
  std::vector<Group> groups_;
};

at::Tensor experts_few(const at::Tensor& x, const at::Tensor& combine_weights, const at::Tensor& w_in,
                       const at::Tensor& w_down, const Maybe& scale_in, const Maybe& scale_down, const Maybe& b_in,
                       const Maybe& b_down, const at::Tensor& token_ids, const at::Tensor& counts,
                       const at::Tensor& slots, c10::string_view activation, bool weigh_input) {
  Inputs in{x, combine_weights, w_in, w_down, b_in, b_down, std::nullopt, token_ids, counts, slots, weigh_input};
  at::Tensor y;
  with_activation(activation, [&](auto act) {
    using Act = decltype(act);
    const Sizes s = check(in, Act::gated, true);
    check_scales(in, scale_in, scale_down, s);
    y = pooled_empty({s.T, s.D}, x.scalar_type());
    auto run = [&]<class T, class W>() { FewRows<T, W, Act>(in, scale_in, scale_down, s, y).run(); };
    const bool narrow_rows = x.scalar_type() == at::kBFloat16;
    if (w_in.scalar_type() != at::kChar) with_dtypes(x.scalar_type(), w_in.scalar_type(), run);
    else if (narrow_rows) run.template operator()<bf16, int8_t>();
    else run.template operator()<float, int8_t>();
  });
  return y;
}

// Outputs begin .. begin + kRowsOfTask of one map, all rows of x laid out as `panel`.
template <class W, class P, class O>
void map_outputs(const P* panel, int64_t ld, int64_t rows, const W* w, int64_t width, int64_t size, int64_t begin,
                 O* out) {
  const int64_t end = std::min(begin + kRowsOfTask, size);
  for (int64_t at = 0; at < rows; at += kFew)
    with_rows(std::min(kFew, rows - at), [&]<int kRows>() {
      auto outputs = [&]<int kWide>(int64_t n) {
        const W* from[kWide];
        for (int j = 0; j < kWide; ++j) from[j] = w + (n + j) * width;
        float sums[kWide * kFew];
        dots<kRows, kWide>(panel + at * ld, ld, from, width, kWide * width, sums);
        for (int j = 0; j < kWide; ++j)
          for (int r = 0; r < kRows; ++r) out[(at + r) * size + n + j] = narrow<O>(sums[j * kFew + r]);
      };
      int64_t n = begin;
      for (; n + kSide<kRows> <= end; n += kSide<kRows>) outputs.template operator()<kSide<kRows>>(n);
      for (; n < end; ++n) outputs.template operator()<1>(n);
    });
}

// Rows of x as a panel for weights W, into `room`.
template <class P, class T>
void lay_out_all(const at::Tensor& x, P* room, int64_t ld) {
  const int64_t rows = x.size(0), width = x.size(1);
  for (int64_t r = 0; r < rows; ++r) lay_out(x.const_data_ptr<T>() + r * width, width, 1.0f, room + r * ld, ld);
}

// x W^T for each W, [T, N] each, in x's dtype.
std::vector<at::Tensor> few_rows_maps(const at::Tensor& x, at::TensorList weights) {
  const auto kind = x.scalar_type();
  bool right = x.dim() == 2 && x.is_contiguous() && x.device().is_cpu() && (kind == at::kFloat || kind == at::kBFloat16);
  for (const at::Tensor& w : weights)
    right = right && w.dim() == 2 && w.is_contiguous() && w.device().is_cpu() && w.size(1) == x.size(1) &&
            (w.scalar_type() == at::kFloat || w.scalar_type() == kind);
  TORCH_CHECK_VALUE(right, "few_rows_maps: takes contiguous matrices of one width on the CPU, x fp32 or bf16, weights "
                           "of its dtype or fp32");
  const int64_t rows = x.size(0), width = x.size(1), ld = round_up(width, kPadding);
  std::vector<at::Tensor> outs;
  std::vector<int64_t> starts{0};
  for (const at::Tensor& w : weights) {
    outs.push_back(pooled_empty({rows, w.size(0)}, kind));
    starts.push_back(starts.back() + pieces(w.size(0)));
  }
  // As fp32 for fp32 weights, and as what multiplies bf16.
  Scratch wide(rows * ld * sizeof(float)), own(rows * ld * sizeof(float));
  with_dtypes(kind, kind, [&]<class T, class W>() {
    using P = typename Panel<T, W>::type;
    lay_out_all<float, T>(x, wide.as<float>(), ld);
    lay_out_all<P, T>(x, own.as<P>(), ld);
    auto outputs = [&](int64_t task) {
      const int64_t i = std::upper_bound(starts.begin(), starts.end(), task) - starts.begin() - 1;
      const int64_t size = outs[i].size(0) ? outs[i].size(1) : 0, begin = (task - starts[i]) * kRowsOfTask;
      T* out = data<T>(outs[i]);
      if (weights[i].scalar_type() == at::kFloat)
        map_outputs(wide.as<float>(), ld, rows, data<float>(weights[i]), width, size, begin, out);
      else
        map_outputs(own.as<P>(), ld, rows, data<W>(weights[i]), width, size, begin, out);
    };
    run_two(starts.back(), 0, threads_for(starts.back()), outputs, [](int64_t) {});
  });
  return outs;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(gatewright, m) {
  m.def(
      "experts_few(Tensor x, Tensor combine_weights, Tensor w_in, Tensor w_down, Tensor? scale_in, Tensor? scale_down, "
      "Tensor? b_in, Tensor? b_down, Tensor token_ids, Tensor counts, Tensor slots, str activation, "
      "bool weigh_input) -> Tensor");
  m.def("few_rows_maps(Tensor x, Tensor[] weights) -> Tensor[]");
}

TORCH_LIBRARY_IMPL(gatewright, CPU, m) {
  m.impl("experts_few", experts_few);
  m.impl("few_rows_maps", few_rows_maps);
}

}  // namespace gatewright

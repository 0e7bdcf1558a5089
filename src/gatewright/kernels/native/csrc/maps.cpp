// Several linear maps of the same tokens, each panel of which is read once for all of them.
#include <torch/library.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "experts.h"

namespace gatewright {
namespace {

// Parts of the tokens whose sums are taken apart, so that they do not depend on threads.
constexpr int64_t kParts = 8;

// Sizes of a call: T tokens of width D, and each map's outputs; raises where they do not fit.
struct Maps {
  int64_t T, D, most = 0, all = 0;
  std::vector<int64_t> outputs;

  Maps(const at::Tensor& x, at::TensorList weights, bool narrowed) {
    auto fits = [](const at::Tensor& one) { return one.dim() == 2 && one.is_contiguous() && one.device().is_cpu(); };
    auto known = [](at::ScalarType kind) { return kind == at::kFloat || kind == at::kBFloat16; };
    TORCH_CHECK_VALUE(fits(x) && known(x.scalar_type()) && !weights.empty(), kTakes);
    T = x.size(0), D = x.size(1);
    const auto kept = weights[0].scalar_type();
    for (const at::Tensor& weight : weights) {
      TORCH_CHECK_VALUE(fits(weight) && weight.scalar_type() == kept && weight.size(1) == D, kTakes);
      outputs.push_back(weight.size(0));
      most = std::max(most, weight.size(0));
      all += weight.numel();
    }
    TORCH_CHECK_VALUE(kept == at::kFloat || (narrowed && kept == at::kBFloat16), kTakes);
  }
  int64_t panels() const { return (T + kPanel - 1) / kPanel; }
  int64_t rows(int64_t panel) const { return std::min(kPanel, T - panel * kPanel); }

  static constexpr const char* kTakes =
      "maps: takes contiguous matrices of one width on the CPU, fp32 or, for x and what is multiplied in it, bf16";
};

// Calls body<X, W, C>() for the dtypes of the tokens, of the weights, and of what is multiplied and returned.
template <class Body>
void with_kinds(at::ScalarType x, at::ScalarType weights, bool narrowed, Body&& body) {
  const bool wide = x == at::kFloat;
  if (!narrowed) return wide ? body.template operator()<float, float, float>() : body.template operator()<bf16, float, float>();
  if (weights == at::kFloat) return wide ? body.template operator()<float, float, bf16>() : body.template operator()<bf16, float, bf16>();
  wide ? body.template operator()<float, bf16, bf16>() : body.template operator()<bf16, bf16, bf16>();
}

// A panel's rows in C, `width` numbers each and `padded` of them, 0 beyond what there is: copied into `room`
// unless they are that already.
template <class C, class X>
const C* rows_in(const X* from, int64_t size, int64_t rows, int64_t padded, int64_t width, C* room) {
  if constexpr (std::is_same_v<C, X>) {
    if (width == size && rows == padded) return from;
  }
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t j = 0; j < size; ++j) room[r * width + j] = narrow<C>(widen(from[r * size + j]));
    for (int64_t j = size; j < width; ++j) room[r * width + j] = narrow<C>(0.0f);
  }
  clear_rows(room, width, rows, padded);
  return room;
}

template <class X, class W, class C>
void forward(const Maps& maps, const at::Tensor& x, at::TensorList weights, std::vector<at::Tensor>& outs) {
  const int64_t D = maps.D, count = weights.size(), width = round_up(D, per_unit<C>);
  std::vector<Scratch> packed;
  std::vector<C*> to;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t N = maps.outputs[i], ld = spread(N);
    to.push_back(data<C>(outs[i]));
    packed.emplace_back(width / per_unit<C> * ld * sizeof(uint32_t));
    const W* weight = data<W>(weights[i]);
    uint32_t* units = packed.back().as<uint32_t>();
    run_range(N, 64, [&](int64_t begin, int64_t end) {
      pack_transposed<C, W>(weight + begin * D, end - begin, D, units + begin, ld);
    });
  }
  Layout layout;
  const size_t x_at = layout.add<C>(kPanel * width), y_at = layout.add<float>(is_bf16<C> ? kPanel * maps.most : 0);
  const int threads = threads_for(maps.panels());
  Scratch scratch(layout.size() * threads);
  run_tasks(maps.panels(), threads, [&](int64_t panel, int thread) {
    char* block = scratch.as<char>() + thread * layout.size();
    const int64_t rows = maps.rows(panel), at = panel * kPanel;
    const C* from = rows_in<C, X>(data<X>(x) + at * D, D, rows, rows, width, reinterpret_cast<C*>(block + x_at));
    for (int64_t i = 0; i < count; ++i) {
      const int64_t N = maps.outputs[i];
      C* out = to[i] + at * N;
      float* sums = is_bf16<C> ? reinterpret_cast<float*>(block + y_at) : reinterpret_cast<float*>(out);
      multiply(rows, N, width, from, width, packed[i].template as<uint32_t>(), spread(N), sums, N, false);
      if constexpr (is_bf16<C>)
        for (int64_t j = 0; j < rows * N; ++j) out[j] = narrow<C>(sums[j]);
    }
    end_of_multiplying();
  });
}

template <class X, class W, class C>
void backward(const Maps& maps, const std::vector<at::Tensor>& gradients, const at::Tensor& x, at::TensorList weights,
              at::Tensor* of_x, std::vector<at::Tensor>& of_weights) {
  const int64_t D = maps.D, count = weights.size();
  const bool need_weights = !of_weights.empty();
  std::vector<Scratch> packed;
  std::vector<const uint32_t*> w;
  std::vector<int64_t> places{0};
  for (int64_t i = 0; i < count; ++i) {
    const int64_t N = maps.outputs[i];
    packed.emplace_back(is_bf16<C> && of_x ? (N + 1) / 2 * D * sizeof(uint32_t) : 0);
    w.push_back(of_x ? pack_rows<C, W>(data<W>(weights[i]), N, D, packed.back().as<uint32_t>()) : nullptr);
    places.push_back(places.back() + N * D);
  }
  const int64_t parts = std::max<int64_t>(1, std::min(kParts, maps.panels())), deep = kPanel / per_unit<C>;
  Layout layout;
  const size_t x_at = layout.add<C>(kPanel * D), g_at = layout.add<C>(kPanel * round_up(maps.most, 2)),
               sum_at = layout.add<float>(std::is_same_v<X, float> ? 0 : kPanel * D),
               x_units_at = layout.add<uint32_t>(is_bf16<C> ? deep * D : 0),
               g_units_at = layout.add<uint32_t>(is_bf16<C> ? deep * maps.most : 0),
               turned_at = layout.add<uint32_t>(deep * maps.most);
  const int threads = threads_for(parts);
  Scratch scratch(layout.size() * threads), sums(need_weights ? parts * maps.all * sizeof(float) : 0);
  run_tasks(parts, threads, [&](int64_t part, int thread) {
    char* block = scratch.as<char>() + thread * layout.size();
    auto units_at = [&](size_t place) { return reinterpret_cast<uint32_t*>(block + place); };
    const int64_t first = maps.panels() * part / parts, last = maps.panels() * (part + 1) / parts;
    if (need_weights && first == last) std::fill_n(sums.as<float>() + part * maps.all, maps.all, 0.0f);
    for (int64_t panel = first; panel < last; ++panel) {
      const int64_t rows = maps.rows(panel), at = panel * kPanel, padded = round_up(rows, per_unit<C>);
      const uint32_t* from = nullptr;
      if (need_weights)
        from = units_of(rows_in<C, X>(data<X>(x) + at * D, D, rows, padded, D, reinterpret_cast<C*>(block + x_at)), D,
                        padded, D, units_at(x_units_at));
      float* to_x = reinterpret_cast<float*>(block + sum_at);
      if (std::is_same_v<X, float> && of_x) to_x = data<float>(*of_x) + at * D;
      for (int64_t i = 0; i < count; ++i) {
        const int64_t N = maps.outputs[i], width = round_up(N, per_unit<C>);
        const C* g = rows_in<C, C>(data<C>(gradients[i]) + at * N, N, rows, padded, width, reinterpret_cast<C*>(block + g_at));
        if (of_x) multiply(rows, D, width, g, width, w[i], D, to_x, D, i > 0);
        if (!need_weights) continue;
        transpose_units(units_of(g, width, padded, N, units_at(g_units_at)), N, padded / per_unit<C>, N, units_at(turned_at), deep);
        multiply(N, D, padded, reinterpret_cast<const C*>(block + turned_at), kPanel, from, D,
                 sums.as<float>() + part * maps.all + places[i], D, panel > first);
      }
      if constexpr (!std::is_same_v<X, float>) {
        if (of_x) {
          X* out = data<X>(*of_x) + at * D;  // not asked of the tensor for every number
          for (int64_t j = 0; j < rows * D; ++j) out[j] = narrow<X>(to_x[j]);
        }
      }
    }
    end_of_multiplying();
  });
  for (int64_t i = 0; need_weights && i < count; ++i) {
    W* out = data<W>(of_weights[i]);
    run_range(maps.outputs[i] * D, 8192, [&](int64_t begin, int64_t end) {
      for (int64_t j = begin; j < end; ++j) {
        float sum = sums.as<float>()[places[i] + j];
        for (int64_t part = 1; part < parts; ++part) sum += sums.as<float>()[part * maps.all + places[i] + j];
        out[j] = narrow<W>(sum);
      }
    });
  }
}

// y_i = x W_i^T, [T, N_i] each; multiplied and returned in bf16 where `narrowed`, else in fp32.
std::vector<at::Tensor> maps_forward(const at::Tensor& x, at::TensorList weights, bool narrowed) {
  const Maps maps(x, weights, narrowed);
  std::vector<at::Tensor> outs;
  for (int64_t size : maps.outputs) outs.push_back(pooled_empty({maps.T, size}, narrowed ? at::kBFloat16 : at::kFloat));
  with_kinds(x.scalar_type(), weights[0].scalar_type(), narrowed,
             [&]<class X, class W, class C>() { forward<X, W, C>(maps, x, weights, outs); });
  return outs;
}

// The gradients of x and of each weight (none of either that is not needed), from those of each y_i.
std::tuple<at::Tensor, std::vector<at::Tensor>> maps_backward(at::TensorList gradients, const at::Tensor& x,
                                                              at::TensorList weights, bool narrowed, bool need_x,
                                                              bool need_weights) {
  const Maps maps(x, weights, narrowed);
  const auto kind = narrowed ? at::kBFloat16 : at::kFloat;
  TORCH_CHECK_VALUE(gradients.size() == weights.size(), "maps: one gradient for each map");
  for (size_t i = 0; i < gradients.size(); ++i) {
    const at::Tensor& one = gradients[i];
    TORCH_CHECK_VALUE(one.scalar_type() == kind && one.is_contiguous() && one.dim() == 2 && one.size(0) == maps.T &&
                          one.size(1) == maps.outputs[i] && one.device().is_cpu(),
                      "maps: gradient ", i, " does not fit");
  }
  at::Tensor of_x = pooled_empty({need_x ? maps.T : 0, maps.D}, x.scalar_type());
  std::vector<at::Tensor> of_weights;
  for (const at::Tensor& weight : weights)
    if (need_weights) of_weights.push_back(pooled_empty(weight.sizes(), weight.scalar_type()));
  with_kinds(x.scalar_type(), weights[0].scalar_type(), narrowed, [&]<class X, class W, class C>() {
    backward<X, W, C>(maps, gradients.vec(), x, weights, need_x ? &of_x : nullptr, of_weights);
  });
  return {of_x, of_weights};
}

}  // namespace
}  // namespace gatewright

TORCH_LIBRARY_FRAGMENT(gatewright, library) {
  library.def("maps_forward(Tensor x, Tensor[] weights, bool narrowed) -> Tensor[]");
  library.def(
      "maps_backward(Tensor[] gradients, Tensor x, Tensor[] weights, bool narrowed, bool need_x, bool need_weights) "
      "-> (Tensor, Tensor[])");
}

TORCH_LIBRARY_IMPL(gatewright, CPU, library) {
  library.impl("maps_forward", TORCH_FN(gatewright::maps_forward));
  library.impl("maps_backward", TORCH_FN(gatewright::maps_backward));
}

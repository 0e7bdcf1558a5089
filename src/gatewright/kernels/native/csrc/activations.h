// The experts' activations and their derivatives, as kernels/activations.py defines them.
#pragma once

#include <string_view>

#include <c10/util/Exception.h>

#include "numbers.h"

namespace gatewright {

struct Linear {
  static constexpr bool gated = false;
  static float value(float a) { return a; }
  static float both(float a, float& slope) {
    slope = 1.0f;
    return a;
  }
};

struct Relu {
  static constexpr bool gated = false;
  static float value(float a) { return a < 0.0f ? 0.0f : a; }
  static float both(float a, float& slope) {
    slope = a <= 0.0f ? 0.0f : 1.0f;
    return value(a);
  }
};

struct Silu {
  static float value(float a) { return a * sigmoid_of(a); }
  static float both(float a, float& slope) {
    const float s = sigmoid_of(a), y = a * s;
    slope = s + y * (1.0f - s);
    return y;
  }
};

struct Gelu {
  static constexpr bool gated = false;
  static float share(float a) { return 0.5f * erfc_of(a * -0.70710678f); }
  static float value(float a) { return a * share(a); }
  static float both(float a, float& slope) {
    const float p = share(a);
    slope = p + a * 0.39894228f * exp_of(-0.5f * a * a);
    return a * p;
  }
};

template <class Gate>
struct Gated {
  static constexpr bool gated = true;
  static float value(float gate, float up) { return Gate::value(gate) * up; }
  // Returns the value; writes what multiplies its gradient for either half.
  static float slopes(float gate, float up, float& of_gate, float& of_up) {
    of_up = Gate::both(gate, of_gate);
    of_gate *= up;
    return of_up * up;
  }
};

// gpt-oss: both halves are cut at 7, and the sigmoid is that of 1.702 times the gate.
struct ClampedSwiglu {
  static constexpr bool gated = true;
  static constexpr float cut = 7.0f, slope = 1.702f;
  static float value(float gate, float up) {
    float g = gate > cut ? cut : gate;
    float u = up > cut ? cut : (up < -cut ? -cut : up);
    return (u + 1.0f) * g * sigmoid_of(slope * g);
  }
  static float slopes(float gate, float up, float& of_gate, float& of_up) {
    float g = gate > cut ? cut : gate;
    float u = up > cut ? cut : (up < -cut ? -cut : up);
    float s = sigmoid_of(slope * g);
    of_up = u == up ? g * s : 0.0f;
    of_gate = g == gate ? (u + 1.0f) * s * (1.0f + slope * g * (1.0f - s)) : 0.0f;
    return (u + 1.0f) * g * s;
  }
};

// Calls `body` with a value of the activation's type.
template <class Body>
void with_activation(std::string_view name, Body&& body) {
  if (name == "swiglu") return body(Gated<Silu>{});
  if (name == "geglu") return body(Gated<Gelu>{});
  if (name == "clamped_swiglu") return body(ClampedSwiglu{});
  if (name == "relu") return body(Relu{});
  if (name == "gelu") return body(Gelu{});
  TORCH_CHECK_VALUE(name == "linear", "activation ", name, " is unknown to the native kernels");
  body(Linear{});
}

}  // namespace gatewright

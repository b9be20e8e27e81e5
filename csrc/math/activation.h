// The activation functions of dense layers: one formula for the CPU's vectors and CUDA's scalars.
//
// float lanes take the fits below, branch-free, whose coefficients were fitted for this file: by
// iterated reweighting towards the least largest relative error, then by a search among the
// neighbouring floats for the least error of the rounded formula, with and without FMA. double
// lanes take the C library's functions one by one, CUDA's own on a device.
#pragma once

#include <math.h>

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "macros.h"

namespace fpi {

// Activation names in Python's order; the numbers cross the operator's schema.
enum Activation : int { kIdentity, kTanh, kRelu, kSigmoid, kSoftplus, kGelu, kActivations };

// The number type of V's lanes, and V's lanes of bits: what a float is to uint32_t.
template <typename V>
struct Lanes {
  using Number = std::remove_reference_t<decltype(std::declval<V&>()[0])>;
  typedef uint32_t Bits __attribute__((vector_size(sizeof(V))));
};
template <>
struct Lanes<float> {
  using Number = float;
  using Bits = uint32_t;
};
template <>
struct Lanes<double> {
  using Number = double;
};

template <typename To, typename From>
FPI_HOST_DEVICE To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From), "the same bits");
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

// Of floats: −|x|, and |x|.
template <typename V>
FPI_HOST_DEVICE V minus_magnitude(V x) {
  return bits_as<V>(bits_as<typename Lanes<V>::Bits>(x) | 0x80000000u);
}
template <typename V>
FPI_HOST_DEVICE V magnitude(V x) {
  return bits_as<V>(bits_as<typename Lanes<V>::Bits>(x) & 0x7fffffffu);
}

// A number in every lane, and hidden from GCC, which makes minps and maxps of a comparison between
// variables alone.
template <typename V, typename Number>
FPI_HOST_DEVICE V hidden(Number number) {
  V v = V{} + number;
#if defined(__SSE2__) && !defined(__CUDACC__)
  __asm__("" : "+x"(v));
#endif
  return v;
}

// NaN stays NaN in both: a comparison with it is false.
template <typename V, typename Number>
FPI_HOST_DEVICE V at_least(V x, Number bound) {
  const V bounds = hidden<V>(bound);
  return bounds > x ? bounds : x;
}
template <typename V, typename Number>
FPI_HOST_DEVICE V at_most(V x, Number bound) {
  const V bounds = hidden<V>(bound);
  return bounds < x ? bounds : x;
}

// c0 + c1 x + c2 x² + ...
template <typename V>
FPI_HOST_DEVICE V polynomial(V, float c0) {
  return V{} + c0;
}
template <typename V, typename... Rest>
FPI_HOST_DEVICE V polynomial(V x, float c0, Rest... rest) {
  return polynomial(x, rest...) * x + c0;
}

// exp(y + correction) = power · (1 + growth) of floats, −104 ≤ y ≤ 0 and a small correction: n ln 2
// is taken off, n whole, and put back as 2ⁿ. ln 2 is a number of 15 bits, whose products with n are
// exact, and the rest.
template <typename V>
struct Exponential {
  V power;   // 2ⁿ⁺²⁴: a normal number where 2ⁿ no longer is
  V growth;  // eʳ − 1, r what is left
};
constexpr float kPowerUnit = 0x1p-24f;
template <typename V>
FPI_HOST_DEVICE Exponential<V> exponential(V y, V correction) {
  // Adding 1.5 2²³ rounds to a whole number, in the lowest bits; with 151 = 127 + 24 there, they
  // shift to the exponent.
  constexpr float kRound = 0x1.8p23f + 151;
  const V shifted = y * 0x1.715476p+0f + kRound;
  const V n = shifted - kRound;
  const V r = y - n * 0x1.62e4p-1f + (correction - n * 0x1.7f7d1cp-20f);
  // |r| ≤ 0.3475: relative error of eʳ 2^-27.1
  const V growth = r * polynomial(r, 1.0f, 0.499999911f, 0.166665107f, 0.0416684672f, 0.0083689047f,
                                  0.00138142216f);
  return {bits_as<V>(bits_as<typename Lanes<V>::Bits>(shifted) << 23), growth};
}

// exp(−|x|) of floats.
template <typename V>
FPI_HOST_DEVICE V decay(V x) {
  const auto e = exponential(at_least(minus_magnitude(x), -104.0f), V{});
  return (e.growth + 1.0f) * e.power * kPowerUnit;
}

// With m / d = 2 tanh(x/2):  tanh x = m d / (d² + m²/4), which forgives errors of m / d where tanh
// saturates; by d − 1, which loses less where tanh x ≈ x. |x| ≤ 9.1: relative error 2^-25.4; from
// 9.02 on tanh is 1 in float.
template <typename V>
FPI_HOST_DEVICE V tanh_fit(V x) {
  const V a = at_most(at_least(x, -9.1f), 9.1f);
  const V t = a * a;
  const V m = (a * t) * polynomial(t, 0.0297595523f, 0.000113941933f) + a;
  const V d = t * polynomial(t, 0.11309287f, 0.00120505062f, 1.22233996e-06f);
  const V y = (m * d + m) / (d * (d + 2.0f) + m * 0.25f * m + 1.0f);
  return at_most(at_least(y, -1.0f), 1.0f);
}

// 1 / (1 + exp(−x)), by an exponential that can't overflow.
template <typename V>
FPI_HOST_DEVICE V sigmoid_fit(V x) {
  const V one = V{} + 1.0f;
  const V e = decay(x);
  return (x < V{} ? e : one) / (one + e);
}

// max(x, 0) + log(1 + e), e = exp(−|x|); log(1 + e) = 2 artanh(s/2), s = 2e / (2 + e).
template <typename V>
FPI_HOST_DEVICE V softplus_fit(V x) {
  const V e = decay(x);
  const V s = (e + e) / (e + 2.0f);
  const V z = s * s;
  // s ≤ 2/3: relative error 2^-27.4
  const V tail = z * polynomial(z, 0.0833330229f, 0.0125067364f, 0.00218760106f, 0.00054716249f);
  return at_least(x, 0.0f) + (s * tail + s);
}

// x Φ(x) = max(x, 0) − a Φ(−a), a = |x|;  a Φ(−a) = exp(−a²/2) a / (2 + √(2π) a) (1 + c), where c
// is between 0 and 0.19. From 14.42 on it's 0.
template <typename V>
FPI_HOST_DEVICE V gelu_fit(V x) {
  const V a = at_most(magnitude(x), 14.42f);
  // a² exactly enough for the exponential: the square of a's upper half is exact.
  const V upper = bits_as<V>(bits_as<typename Lanes<V>::Bits>(a) & 0xfffff000u);
  const auto e = exponential(upper * upper * -0.5f, (a - upper) * (a + upper) * -0.5f);
  const V base = a / (a * 2.50662827f + 2.0f);
  // a ≤ 14.45: error 2^-26.8 of 1 + c
  const V c =
      a * polynomial(a, 0.455430014f, 0.292345328f, 0.0853577177f, 0.0113094572f) /
      polynomial(a, 1.0f, 1.739793f, 1.30538609f, 0.537826909f, 0.124697701f, 0.0141753342f);
  const V excess = e.growth * c + c + e.growth;  // (1 + growth) (1 + c) − 1
  return at_least(x, 0.0f) - (base * excess + base) * e.power * kPowerUnit;
}

// The formulas of one double.
FPI_HOST_DEVICE double sigmoid_of(double x) {
  const double e = exp(-fabs(x));
  return (x < 0 ? e : 1.0) / (1.0 + e);
}
FPI_HOST_DEVICE double softplus_of(double x) { return at_least(x, 0.0) + log1p(exp(-fabs(x))); }

// x/2 erfc(t), t = −x / √2. Rounding t costs erfc 2t² of it, hundreds of ulps in the tail: what is
// lost goes back by erfc's derivative, relative to erfc about t + √(t² + 4/π), negated.
FPI_HOST_DEVICE double gelu_of(double x) {
  constexpr double kRoot = 0x1.6a09e667f3bcdp-1, kRest = -0x1.bdd3413b26456p-55;  // √½
  const double low = at_least(x, -40.0);                                          // 0 from here on
  const double minus = -at_most(low, 10.0);                                       // and erfc is 2
  const double t = minus * kRoot;
  const double lost = fma(minus, kRoot, -t) + minus * kRest;
  const double slope = t + sqrt(t * t + 1.2732395447351628);
  const double e = erfc(t);
  return 0.5 * low * (e - e * (lost * slope));
}

// phi(x), lane by lane. V: float, double, or a GCC vector of float or of double.
template <Activation kActivation, typename V>
FPI_HOST_DEVICE V activate(V x) {
  using Number = typename Lanes<V>::Number;
  static_assert(kActivation >= kIdentity && kActivation < kActivations, "no such activation");
  if constexpr (kActivation == kIdentity) {
    return x;
  } else if constexpr (kActivation == kRelu) {
    return at_least(x, Number(0));
  } else if constexpr (std::is_same_v<V, double>) {
    if constexpr (kActivation == kTanh) {
      return tanh(x);
    } else if constexpr (kActivation == kSigmoid) {
      return sigmoid_of(x);
    } else if constexpr (kActivation == kSoftplus) {
      return softplus_of(x);
    } else {
      return gelu_of(x);
    }
  } else if constexpr (std::is_same_v<Number, double>) {
    V y = x;
    for (unsigned l = 0; l < sizeof(V) / sizeof(Number); ++l) {
      y[l] = activate<kActivation>(Number(x[l]));
    }
    return y;
#ifndef __CUDACC__
  } else if constexpr (std::is_same_v<V, float>) {
    // In a vector's lane: the compiler then fuses the same products and sums as in any other.
    typedef float Four __attribute__((vector_size(16)));
    return activate<kActivation>(Four{x})[0];
#endif
  } else if constexpr (kActivation == kTanh) {
    return tanh_fit(x);
  } else if constexpr (kActivation == kSigmoid) {
    return sigmoid_fit(x);
  } else if constexpr (kActivation == kSoftplus) {
    return softplus_fit(x);
  } else {
    return gelu_fit(x);
  }
}

}  // namespace fpi

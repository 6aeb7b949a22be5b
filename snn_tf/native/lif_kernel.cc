#include "lif_kernel.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace snn_tf {
namespace {

constexpr float kPi = 3.14159265358979f;

inline float ToFloat(float value) { return value; }

inline float ToFloat(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &wide, sizeof(value));
  return value;
}

inline void Store(float value, float* target) { *target = value; }

// Rounds to nearest, ties to even; a NaN stays one.
inline void Store(float value, uint16_t* target) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  const uint32_t rounded = bits + 0x7FFFu + ((bits >> 16) & 1u);
  const bool is_nan = (bits & 0x7FFFFFFFu) > 0x7F800000u;
  *target = static_cast<uint16_t>((is_nan ? bits | 0x400000u : rounded) >> 16);
}

template <typename Value>
inline void StoreRow(const float* __restrict values, Value* __restrict target, int64_t width) {
  for (int64_t i = 0; i < width; ++i) Store(values[i], target + i);
}

// The sum of a block, in an order that vector units can keep.
inline float Sum(const float* __restrict values) {
  constexpr int64_t kLanes = 16;
  float lanes[kLanes] = {};
  for (int64_t i = 0; i < kBlock; i += kLanes) {
    for (int64_t lane = 0; lane < kLanes; ++lane) lanes[lane] += values[i + lane];
  }
  float sum = 0.0f;
  for (float lane : lanes) sum += lane;
  return sum;
}

template <Surrogate kKind>
inline float UnitHeight(float z) {
  if constexpr (kKind == Surrogate::kTriangle) {
    return std::max(1.0f - std::fabs(z), 0.0f);
  } else if constexpr (kKind == Surrogate::kRectangular) {
    return std::fabs(z) < 0.5f ? 1.0f : 0.0f;
  } else if constexpr (kKind == Surrogate::kSigmoid) {
    const float s = 1.0f / (1.0f + std::exp(-4.0f * z));
    return 4.0f * s * (1.0f - s);
  } else {
    return 1.0f / (1.0f + (kPi * z) * (kPi * z));
  }
}

// The bias of neurons [first, first + kBlock), which wraps around the channels.
inline void FillBias(const LifShape& shape, const float* bias, int64_t first, float* block) {
  if (!bias) {
    std::memset(block, 0, kBlock * sizeof(float));
    return;
  }
  int64_t channel = first % shape.channels;
  for (int64_t i = 0; i < kBlock; ++i) {
    block[i] = bias[channel];
    channel = channel + 1 < shape.channels ? channel + 1 : 0;
  }
}

// u[t] before the reset, from u[t-1] after it; `width` is kBlock but in the last block.
template <typename Value>
inline void Integrate(float leak, const Value* __restrict current, const float* __restrict bias,
                      const float* __restrict membrane, float* __restrict u, int64_t width) {
  for (int64_t i = 0; i < width; ++i) u[i] = leak * membrane[i] + (ToFloat(current[i]) + bias[i]);
}

template <typename Value>
inline void Fire(float v_th, const float* __restrict u, Value* __restrict spikes, int64_t width) {
  for (int64_t i = 0; i < width; ++i) Store(u[i] > v_th ? 1.0f : 0.0f, spikes + i);
}

// The membranes before the first step.
inline void Start(const LifParameters& p, float* __restrict membrane) {
  std::fill_n(membrane, kBlock, p.initial * p.v_th);
}

inline void Reset(float v_th, const float* __restrict u, float* __restrict membrane, int64_t width) {
  for (int64_t i = 0; i < width; ++i) membrane[i] = u[i] - (u[i] > v_th ? v_th : 0.0f);
}

struct Accumulators {
  alignas(64) float d_u[kBlock];             // dL/du[t] before the reset
  alignas(64) float rho[kBlock] = {};        // dL/du[t] after the reset
  alignas(64) float d_leak[kBlock] = {};     // sums over time, by neuron
  alignas(64) float d_v_th[kBlock] = {};
  alignas(64) float d_current[kBlock] = {};  // sum over time: the gradient of bias and constant current
};

// One step of the chain rule, backwards; `before` is u[t-1] after its reset. Every array is its own
// pointer and every choice a value, so that the loop becomes vector instructions.
template <Surrogate kKind, typename Value>
__attribute__((noinline)) void StepBack(float leak, float v_th, float scale, float price,
                     const Value* __restrict d_spikes, const float* __restrict u,
                     const float* __restrict before, float* __restrict d_u, float* __restrict rho,
                     float* __restrict d_leak, float* __restrict d_v_th, int64_t width) {
  const float inverse = 1.0f / v_th;
  for (int64_t i = 0; i < width; ++i) {
    const float z = u[i] / v_th - 1.0f;
    const float d_z = (ToFloat(d_spikes[i]) + price) * (scale * UnitHeight<kKind>(z)) * inverse;
    const float fired = u[i] > v_th ? 1.0f : 0.0f;
    d_u[i] = d_z + rho[i];
    d_v_th[i] -= d_z * u[i] * inverse + rho[i] * fired;
    d_leak[i] += d_u[i] * before[i];
    rho[i] = leak * d_u[i];
  }
}

template <Surrogate kKind, typename Value>
void Backward(const LifShape& shape, const LifParameters& p, float scale, const Value* current,
              const Value* d_spikes, Value* d_current, int64_t begin, int64_t end, float* scratch,
              LifSums* sums) {
  alignas(64) float bias[kBlock];
  alignas(64) float membrane[kBlock];
  for (int64_t first = begin; first < end; first += kBlock) {
    const int64_t width = std::min(kBlock, end - first);
    FillBias(shape, p.bias, first, bias);
    Start(p, membrane);
    for (int64_t t = 0; t < shape.steps; ++t) {
      const int64_t row = shape.constant ? 0 : t;
      float* u = scratch + t * kBlock;
      Integrate(p.leak, current + row * shape.neurons + first, bias, membrane, u, width);
      Reset(p.v_th, u, membrane, width);
    }
    Accumulators totals;
    for (int64_t t = shape.steps - 1; t >= 0; --t) {
      const float* u = scratch + t * kBlock;
      if (t) {
        Reset(p.v_th, u - kBlock, membrane, width);
      } else {
        Start(p, membrane);
      }
      StepBack<kKind>(p.leak, p.v_th, scale, p.price, d_spikes + t * shape.neurons + first, u, membrane,
                      totals.d_u, totals.rho, totals.d_leak, totals.d_v_th, width);
      for (int64_t i = 0; i < width; ++i) totals.d_current[i] += totals.d_u[i];
      if (!shape.constant) StoreRow(totals.d_u, d_current + t * shape.neurons + first, width);
    }
    if (shape.constant) StoreRow(totals.d_current, d_current + first, width);
    for (int64_t i = 0; i < width; ++i) totals.d_v_th[i] += p.initial * totals.rho[i];
    sums->d_leak += Sum(totals.d_leak);
    sums->d_v_th += Sum(totals.d_v_th);
    int64_t channel = p.bias ? first % shape.channels : 0;
    for (int64_t i = 0; p.bias && i < width; ++i) {
      sums->d_bias[channel] += totals.d_current[i];
      channel = channel + 1 < shape.channels ? channel + 1 : 0;
    }
  }
}

}  // namespace

template <typename Value>
void LifForward(const LifShape& shape, const LifParameters& p, const Value* current, Value* spikes,
                int64_t begin, int64_t end) {
  alignas(64) float bias[kBlock];
  alignas(64) float u[kBlock];
  alignas(64) float membrane[kBlock];
  for (int64_t first = begin; first < end; first += kBlock) {
    const int64_t width = std::min(kBlock, end - first);
    FillBias(shape, p.bias, first, bias);
    Start(p, membrane);
    for (int64_t t = 0; t < shape.steps; ++t) {
      const int64_t row = shape.constant ? 0 : t;
      Integrate(p.leak, current + row * shape.neurons + first, bias, membrane, u, width);
      Fire(p.v_th, u, spikes + t * shape.neurons + first, width);
      Reset(p.v_th, u, membrane, width);
    }
  }
}

template <typename Value>
void LifBackward(const LifShape& shape, const LifParameters& p, Surrogate surrogate, float scale,
                 const Value* current, const Value* d_spikes, Value* d_current, int64_t begin, int64_t end,
                 float* scratch, LifSums* sums) {
  const auto run = [&](auto kernel) {
    kernel(shape, p, scale, current, d_spikes, d_current, begin, end, scratch, sums);
  };
  switch (surrogate) {
    case Surrogate::kTriangle: return run(Backward<Surrogate::kTriangle, Value>);
    case Surrogate::kRectangular: return run(Backward<Surrogate::kRectangular, Value>);
    case Surrogate::kSigmoid: return run(Backward<Surrogate::kSigmoid, Value>);
    case Surrogate::kArctan: return run(Backward<Surrogate::kArctan, Value>);
  }
}

#define SNN_TF_INSTANTIATE(Value)                                                                          \
  template void LifForward<Value>(const LifShape&, const LifParameters&, const Value*, Value*, int64_t,    \
                                  int64_t);                                                                \
  template void LifBackward<Value>(const LifShape&, const LifParameters&, Surrogate, float, const Value*,  \
                                   const Value*, Value*, int64_t, int64_t, float*, LifSums*);
SNN_TF_INSTANTIATE(float)
SNN_TF_INSTANTIATE(uint16_t)
#undef SNN_TF_INSTANTIATE

}  // namespace snn_tf

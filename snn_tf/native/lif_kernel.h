// Leaky integrate-and-fire over time, forward and gradient, on plain memory.
//
// The equations are those of snn_tf/neuron.py. Neurons are independent of each other, so memory is
// walked in blocks that stay in the cache for all time steps. Currents, spikes and their gradients are
// [steps, neurons], float or bfloat16; membranes are float and live in a block only.

#ifndef SNN_TF_NATIVE_LIF_KERNEL_H_
#define SNN_TF_NATIVE_LIF_KERNEL_H_

#include <cstdint>

namespace snn_tf {

enum class Surrogate { kTriangle, kRectangular, kSigmoid, kArctan };

struct LifShape {
  int64_t steps;     // T
  int64_t neurons;   // per time step
  int64_t channels;  // of the bias; neuron n has channel n % channels
  bool constant;     // one current [1, neurons] stands for all steps
};

struct LifParameters {
  float leak;
  float v_th;
  float initial;      // membranes before the first step, as a share of v_th
  const float* bias;  // [channels], or null
  float price;        // added to the gradient of every spike
};

// Sums of one range of neurons. d_bias is [channels], or null without a bias.
struct LifSums {
  float d_leak;
  float d_v_th;
  float* d_bias;
};

// Neurons of a block: all its membranes and accumulators fit the first-level cache.
constexpr int64_t kBlock = 256;

// Writes the spikes of neurons [begin, end). Value is float, or uint16_t for the bits of a bfloat16.
template <typename Value>
void LifForward(const LifShape& shape, const LifParameters& parameters, const Value* current, Value* spikes,
                int64_t begin, int64_t end);

// Writes d_current of neurons [begin, end), and the range's sums. The forward scan is replayed in
// `scratch`, which holds steps * kBlock floats.
template <typename Value>
void LifBackward(const LifShape& shape, const LifParameters& parameters, Surrogate surrogate, float scale,
                 const Value* current, const Value* d_spikes, Value* d_current, int64_t begin, int64_t end,
                 float* scratch, LifSums* sums);

}  // namespace snn_tf

#endif  // SNN_TF_NATIVE_LIF_KERNEL_H_

// The kernels of lif_kernel.h as TensorFlow operations for CPUs.
//
// Work is cut into ranges of a fixed number of neurons, whatever the number of threads, and their
// partial sums are added in order: results do not depend on scheduling.

#include <algorithm>
#include <vector>

#include "lif_kernel.h"
#include "tensorflow/core/framework/op.h"
#include "tensorflow/core/framework/op_kernel.h"
#include "tensorflow/core/framework/shape_inference.h"
#include "tensorflow/core/platform/threadpool.h"

namespace snn_tf {
namespace {

using tensorflow::OpKernel;
using tensorflow::OpKernelConstruction;
using tensorflow::OpKernelContext;
using tensorflow::Tensor;
using tensorflow::TensorShape;

constexpr int64_t kRange = 32 * kBlock;
constexpr int64_t kCyclesPerNeuronStep = 4;

REGISTER_OP("SnnTfLif")
    .Attr("T: {float, bfloat16}")
    .Attr("timesteps: int >= 1")
    .Attr("initial: float")
    .Input("current: T")
    .Input("leak: float")
    .Input("v_th: float")
    .Input("bias: float")
    .Output("spikes: T")
    .SetShapeFn([](tensorflow::shape_inference::InferenceContext* c) {
      int steps;
      TF_RETURN_IF_ERROR(c->GetAttr("timesteps", &steps));
      tensorflow::shape_inference::ShapeHandle current, spikes;
      TF_RETURN_IF_ERROR(c->WithRankAtLeast(c->input(0), 2, &current));
      TF_RETURN_IF_ERROR(c->ReplaceDim(current, 0, c->MakeDim(steps), &spikes));
      c->set_output(0, spikes);
      return absl::OkStatus();
    });

REGISTER_OP("SnnTfLifGrad")
    .Attr("T: {float, bfloat16}")
    .Attr("surrogate: int")
    .Attr("scale: float")
    .Attr("initial: float")
    .Input("current: T")
    .Input("leak: float")
    .Input("v_th: float")
    .Input("bias: float")
    .Input("d_spikes: T")
    .Input("price: float")
    .Output("d_current: T")
    .Output("d_leak: float")
    .Output("d_v_th: float")
    .Output("d_bias: float")
    .SetShapeFn([](tensorflow::shape_inference::InferenceContext* c) {
      c->set_output(0, c->input(0));
      c->set_output(1, c->Scalar());
      c->set_output(2, c->Scalar());
      c->set_output(3, c->input(3));
      return absl::OkStatus();
    });

template <typename T>
struct Bits {
  using type = float;
};
template <>
struct Bits<Eigen::bfloat16> {
  using type = uint16_t;
};

// Shape of a problem and its parameters, read from the common inputs. An empty bias means none.
struct Problem {
  Problem(OpKernelContext* context, int64_t steps, float initial, float price = 0.0f) {
    const Tensor& current = context->input(0);
    const Tensor& bias = context->input(3);
    const int64_t rows = current.dim_size(0);
    shape.steps = steps;
    shape.neurons = rows ? current.NumElements() / rows : 0;
    shape.channels = bias.NumElements();
    shape.constant = rows == 1 && steps > 1;
    parameters.leak = context->input(1).scalar<float>()();
    parameters.v_th = context->input(2).scalar<float>()();
    parameters.initial = initial;
    parameters.price = price;
    parameters.bias = shape.channels ? bias.flat<float>().data() : nullptr;
    valid = rows == 1 || rows == steps;
  }

  int64_t ranges() const { return (shape.neurons + kRange - 1) / kRange; }

  // Calls work(index, begin, end) for every range of neurons, on TensorFlow's threads.
  template <typename Work>
  void ForRanges(OpKernelContext* context, const Work& work) const {
    const auto some = [&](int64_t first, int64_t last) {
      for (int64_t index = first; index < last; ++index) {
        work(index, index * kRange, std::min(shape.neurons, (index + 1) * kRange));
      }
    };
    auto* pool = context->device()->tensorflow_cpu_worker_threads()->workers;
    pool->ParallelFor(ranges(), kRange * shape.steps * kCyclesPerNeuronStep, some);
  }

  LifShape shape;
  LifParameters parameters;
  bool valid;
};

template <typename T>
class LifOp : public OpKernel {
 public:
  explicit LifOp(OpKernelConstruction* context) : OpKernel(context) {
    OP_REQUIRES_OK(context, context->GetAttr("timesteps", &steps_));
    OP_REQUIRES_OK(context, context->GetAttr("initial", &initial_));
  }

  void Compute(OpKernelContext* context) override {
    using Value = typename Bits<T>::type;
    const Problem problem(context, steps_, initial_);
    OP_REQUIRES(context, problem.valid,
                absl::InvalidArgumentError("current must have 1 or `timesteps` rows"));
    TensorShape shape = context->input(0).shape();
    shape.set_dim(0, steps_);
    Tensor* spikes = nullptr;
    OP_REQUIRES_OK(context, context->allocate_output(0, shape, &spikes));
    const auto* current = reinterpret_cast<const Value*>(context->input(0).flat<T>().data());
    auto* fired = reinterpret_cast<Value*>(spikes->flat<T>().data());
    problem.ForRanges(context, [&](int64_t, int64_t begin, int64_t end) {
      LifForward(problem.shape, problem.parameters, current, fired, begin, end);
    });
  }

 private:
  int steps_;
  float initial_;
};

template <typename T>
class LifGradOp : public OpKernel {
 public:
  explicit LifGradOp(OpKernelConstruction* context) : OpKernel(context) {
    OP_REQUIRES_OK(context, context->GetAttr("surrogate", &surrogate_));
    OP_REQUIRES_OK(context, context->GetAttr("scale", &scale_));
    OP_REQUIRES_OK(context, context->GetAttr("initial", &initial_));
  }

  void Compute(OpKernelContext* context) override {
    using Value = typename Bits<T>::type;
    const Tensor& d_spikes = context->input(4);
    const float price = context->input(5).scalar<float>()();
    const Problem problem(context, d_spikes.dim_size(0), initial_, price);
    OP_REQUIRES(context, problem.valid, absl::InvalidArgumentError("current does not fit d_spikes"));
    Tensor *d_current, *d_leak, *d_v_th, *d_bias;
    OP_REQUIRES_OK(context, context->allocate_output(0, context->input(0).shape(), &d_current));
    OP_REQUIRES_OK(context, context->allocate_output(1, {}, &d_leak));
    OP_REQUIRES_OK(context, context->allocate_output(2, {}, &d_v_th));
    OP_REQUIRES_OK(context, context->allocate_output(3, context->input(3).shape(), &d_bias));

    const int64_t channels = problem.shape.channels;
    std::vector<float> biases(problem.ranges() * channels, 0.0f);
    std::vector<LifSums> sums(problem.ranges());
    const auto* current = reinterpret_cast<const Value*>(context->input(0).flat<T>().data());
    const auto* upstream = reinterpret_cast<const Value*>(d_spikes.flat<T>().data());
    auto* target = reinterpret_cast<Value*>(d_current->flat<T>().data());
    problem.ForRanges(context, [&](int64_t index, int64_t begin, int64_t end) {
      std::vector<float> scratch(problem.shape.steps * kBlock);
      sums[index] = {0.0f, 0.0f, biases.data() + index * channels};
      LifBackward(problem.shape, problem.parameters, static_cast<Surrogate>(surrogate_), scale_, current,
                  upstream, target, begin, end, scratch.data(), &sums[index]);
    });

    double leak = 0.0, v_th = 0.0;
    auto bias = d_bias->flat<float>();
    bias.setZero();
    for (const LifSums& part : sums) {
      leak += part.d_leak;
      v_th += part.d_v_th;
      for (int64_t c = 0; c < channels; ++c) bias(c) += part.d_bias[c];
    }
    d_leak->scalar<float>()() = static_cast<float>(leak);
    d_v_th->scalar<float>()() = static_cast<float>(v_th);
  }

 private:
  int surrogate_;
  float scale_;
  float initial_;
};

#define SNN_TF_REGISTER(T)                                                                             \
  REGISTER_KERNEL_BUILDER(Name("SnnTfLif").Device(tensorflow::DEVICE_CPU).TypeConstraint<T>("T"),      \
                          LifOp<T>);                                                                   \
  REGISTER_KERNEL_BUILDER(Name("SnnTfLifGrad").Device(tensorflow::DEVICE_CPU).TypeConstraint<T>("T"),  \
                          LifGradOp<T>);
SNN_TF_REGISTER(float)
SNN_TF_REGISTER(Eigen::bfloat16)
#undef SNN_TF_REGISTER

}  // namespace
}  // namespace snn_tf

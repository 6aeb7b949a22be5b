"""What a scan over time keeps of its forward pass for its gradient, read from the graph."""

import tensorflow as tf

from snn_tf.surrogate import Surrogate


def kept_for_gradient(scan, timesteps):
    """Arrays that the gradient of a scan reads from its forward pass, less the current itself."""
    with tf.Graph().as_default() as graph:
        current = tf.compat.v1.placeholder(tf.float32, [timesteps, 2, 3])
        scalars = [tf.compat.v1.placeholder(tf.float32, []) for _ in range(2)]
        spikes = scan(current, *scalars, timesteps, Surrogate())
        forward = {op.name for op in graph.get_operations()}
        upstream = tf.compat.v1.placeholder(tf.float32, spikes.shape)
        gradients = tf.gradients(spikes, [current, *scalars], grad_ys=upstream)
        assert all(gradient is not None for gradient in gradients)
        backward = [op for op in graph.get_operations() if op.name not in forward]
    read = {tensor.ref() for op in backward for tensor in op.inputs if tensor.op.name in forward}
    arrays = [ref.deref() for ref in read if ref.deref().shape.num_elements() > 1]
    return [tensor.name for tensor in arrays if source(tensor) is not current]


def source(tensor):
    """The tensor that a chain of identities starts from."""
    while tensor.op.type in ("Identity", "IdentityN"):
        tensor = tensor.op.inputs[tensor.value_index]
    return tensor

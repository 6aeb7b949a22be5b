"""The neuron's equations in NumPy: a scan without gradients, surrogates, and their antiderivatives.

Written from the equations, with loops where they say so; nothing of the package is used here.
"""

import numpy as np

KINDS = ("triangle", "rectangular", "sigmoid", "arctan")


def sigmoid(x):
    return 1.0 / (1.0 + np.exp(-x))


def surrogate(kind, z, scale):
    """do/dz, γ = `scale`."""
    if kind == "triangle":
        return np.where(np.abs(z) < 1.0, scale * (1.0 - np.abs(z)), 0.0)
    if kind == "rectangular":
        return np.where(np.abs(z) < 0.5, scale, 0.0)
    if kind == "sigmoid":
        return 4.0 * scale * sigmoid(4.0 * z) * (1.0 - sigmoid(4.0 * z))
    return scale / (1.0 + (np.pi * z) ** 2)


def antiderivative(kind, z, scale):
    """σ with σ' = the surrogate; its constant is of no use and left free."""
    if kind == "triangle":
        x = np.clip(z, -1.0, 1.0)
        return scale * (x - x * np.abs(x) / 2.0)
    if kind == "rectangular":
        return scale * np.clip(z, -0.5, 0.5)
    if kind == "sigmoid":
        return scale * sigmoid(4.0 * z)
    return scale * np.arctan(np.pi * z) / np.pi


def lif(current, leak, v_th, initial=0.0):
    """Spikes and membranes after the reset, [T, ...], in the type of `current`, [T, ...].

    Membranes start at `initial` · v_th.
    """
    leak, v_th = current.dtype.type(leak), current.dtype.type(v_th)
    spikes, membranes = np.zeros_like(current), np.zeros_like(current)
    u = np.full_like(current[0], initial * v_th)
    for t, arriving in enumerate(current):
        u = leak * u + arriving
        spikes[t] = u > v_th
        u = u - v_th * spikes[t]
        membranes[t] = u
    return spikes, membranes


def grid_currents(rng, shape):
    """Currents on a grid of 2⁻⁶ in [−1, 2), exact in float32 and bfloat16."""
    return (rng.integers(-64, 128, shape) / 64).astype(np.float32)

"""Attention-guided compression of convolutional networks into low-latency spiking networks."""

__version__ = "0.1.0"

"""Shared by all tests: TensorFlow's own messages stay out of the reports."""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
# oneDNN's filter gradients depend, in the last bit, on which thread runs them.
os.environ.setdefault("TF_NUM_INTEROP_THREADS", "1")

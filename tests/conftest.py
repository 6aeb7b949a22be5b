"""Shared by all tests: TensorFlow's own messages stay out of the reports, and SIGINT is not ignored."""

import os
import signal

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
# oneDNN's filter gradients depend, in the last bit, on which thread runs them.
os.environ.setdefault("TF_NUM_INTEROP_THREADS", "1")
# A shell's background job, which a test run may be, would have its tests of SIGINT fail.
signal.signal(signal.SIGINT, signal.default_int_handler)

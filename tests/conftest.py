"""Shared by all tests: TensorFlow's own messages stay out of the reports, and no signal is ignored."""

import os
import signal

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
# oneDNN's filter gradients depend, in the last bit, on which thread runs them.
os.environ.setdefault("TF_NUM_INTEROP_THREADS", "1")
# A test run may be a shell's background job or under nohup, which have a signal ignored each.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

"""What command line words lead to, without a process of their own."""

from absl import flags

from snn_tf import cli
from snn_tf.config import Config


def parsed(*words: str) -> Config:
    """The settings, as `train.py` reads them."""
    flag_values = flags.FlagValues()
    cli.define_flags(flag_values)
    return cli.parse(["train.py", *words], flag_values)

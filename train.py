"""Trains, compresses, converts, evaluates and exports: `python train.py --flagfile=FILE`."""

from snn_tf import cli

if __name__ == "__main__":
    cli.run()

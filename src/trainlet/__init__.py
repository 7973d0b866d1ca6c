# SPDX-License-Identifier: Apache-2.0
"""trainlet: train a neural network on a microcontroller."""

__version__ = "0.1.0"

# SPDX-License-Identifier: Apache-2.0
"""The published checkpoints: PyTorch pickles, read without running code."""

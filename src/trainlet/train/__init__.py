# SPDX-License-Identifier: Apache-2.0
"""Training runs: data, epochs, state files."""

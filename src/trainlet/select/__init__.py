# SPDX-License-Identifier: Apache-2.0
"""What to train: contributions measured by short runs, and selectors that choose under a limit of real memory."""

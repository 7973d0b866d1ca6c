# SPDX-License-Identifier: Apache-2.0
"""Programs made from C: compilers, chips, what is in a linked program."""

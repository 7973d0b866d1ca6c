# SPDX-License-Identifier: Apache-2.0
"""The first run, which needs no file."""

# SPDX-License-Identifier: Apache-2.0
"""Graph to graph transformations, one per file: valid in, valid out."""

# SPDX-License-Identifier: Apache-2.0
"""Attacks on the project, and the means to count what comes of them. ``python bench/hostile.py`` runs them for long."""

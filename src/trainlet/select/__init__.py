# SPDX-License-Identifier: Apache-2.0
"""What to train: contributions measured by short runs, and selectors that choose under a limit of real memory."""

from trainlet.callable import make_callable

make_callable(__name__)

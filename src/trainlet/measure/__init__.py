# SPDX-License-Identifier: Apache-2.0
"""What a compiled model needs and does, measured; what it is compared with."""

from trainlet.callable import make_callable

make_callable(__name__)

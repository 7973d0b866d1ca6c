# SPDX-License-Identifier: Apache-2.0
"""``python -m trainlet`` is the command ``trainlet``."""

from __future__ import annotations

import sys

from trainlet.cli import main

sys.exit(main())

# SPDX-License-Identifier: Apache-2.0
"""``python -m trainlet.cli``."""

from __future__ import annotations

import sys

from trainlet.cli import main

sys.exit(main())

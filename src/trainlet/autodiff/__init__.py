# SPDX-License-Identifier: Apache-2.0
"""What trains, and the training step that follows from it."""

from trainlet.autodiff.scheme import UpdateScheme, resolve
from trainlet.autodiff.walk import differentiate

__all__ = ["UpdateScheme", "differentiate", "resolve"]

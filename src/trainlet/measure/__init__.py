# SPDX-License-Identifier: Apache-2.0
"""What a compiled model needs and does, measured; what it is compared with."""

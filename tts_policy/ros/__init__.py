# SPDX-License-Identifier: Apache-2.0
"""The robot side: messages in, messages out, and no model arithmetic."""

# SPDX-License-Identifier: Apache-2.0
"""From demonstrations in bags to a policy, a pruner and their bundle, and their evaluation."""

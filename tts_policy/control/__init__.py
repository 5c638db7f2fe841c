# SPDX-License-Identifier: Apache-2.0
"""From samples to windows and from chunks to commands, on numpy alone."""

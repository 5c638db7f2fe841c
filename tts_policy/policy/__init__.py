# SPDX-License-Identifier: Apache-2.0
"""The test-time sparse diffusion policy, on torch alone."""

"""Compute kernels of the appliance, imported as `appliance.kernels`. This module imports nothing on purpose: see docs/design.md."""

__version__ = "0"

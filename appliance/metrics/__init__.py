"""Measurements: the metric catalogue, the recorder that feeds it, live windows and hardware readings."""

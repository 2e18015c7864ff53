"""The load generator behind `appliance bench`."""

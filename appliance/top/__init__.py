"""`appliance top`: a live view of an appliance in the terminal, from what /metrics says."""

"""The dashboards, one file each: what a board shows, made into Grafana's JSON by `dashboards/build.py`."""

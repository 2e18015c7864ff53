"""The web console: static files and its JSON endpoints."""

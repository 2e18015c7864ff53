"""`appliance report`: what happened, as one HTML file, from SQL alone."""

"""One module a command of the `appliance` program."""

"""The jobs behind the commands: each takes one checked request and does all of it."""

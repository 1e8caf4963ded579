"""The control socket of a machine's process: server, client, console, and the process itself."""

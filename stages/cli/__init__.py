"""The command line: commands, options, the console (the only place with typer)."""

"""vmf: run, move and take apart virtual machines."""

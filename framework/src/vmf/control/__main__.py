"""`python -m vmf.control`: the process of one machine, started by `vmf.control.process.spawn_detached`.

What is imported at the start lives as long as the process does, so the garbage collector is kept from looking at it
again and again: start-up is what a user waits for. At the end everything has been written and closed, and the kernel
takes back the rest at once; the interpreter would take it apart piece by piece, for a tenth of a second of a processor
that the machine may need, which has just gone to another process of this host.
"""

import gc
import logging
import os
import sys

gc.disable()

from vmf.control.process import main  # noqa: E402 - after the collector was stopped

gc.freeze()
gc.enable()
status = main()
logging.shutdown()
sys.stdout.flush()
sys.stderr.flush()
os._exit(status)

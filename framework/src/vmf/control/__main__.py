"""`python -m vmf.control`: the process of one machine, started by `vmf.control.process.spawn_detached`.

What is imported at the start lives as long as the process does, so the garbage collector is kept from looking at it
again and again: start-up is what a user waits for.
"""

import gc
import sys

gc.disable()

from vmf.control.process import main  # noqa: E402 - after the collector was stopped

gc.freeze()
gc.enable()
sys.exit(main())

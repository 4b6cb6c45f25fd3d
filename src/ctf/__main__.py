import os
import sys

from ctf.cli import main

code = main()
if "TORCHELASTIC_RUN_ID" in os.environ:
    # One of torchrun's processes, and all is written. Threads of gloo that are still there when
    # Python takes itself apart can abort it ("terminate called without an active exception").
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
sys.exit(code)

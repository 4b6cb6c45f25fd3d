import sys

from ctf.cli import main

sys.exit(main())

"""python -m utils.sweep SWEEP.yaml [--jobs N] [key value ...]"""

import sys

from utils.command_line import exit_code
from utils.sweep.command import main

if __name__ == "__main__":
    sys.exit(exit_code(main))

"""python -m utils.compare RUN ... [--out FILE]"""

import sys

from utils.command_line import exit_code
from utils.compare.page import main

if __name__ == "__main__":
    sys.exit(exit_code(main))

"""python -m utils.bench [PART ...]"""

import sys

from utils.bench.measure import main
from utils.command_line import exit_code

if __name__ == "__main__":
    sys.exit(exit_code(main))

import sys

from dlrm_scale.libraries import loading_libraries

with loading_libraries():
    from tools.tune.cli import main

sys.exit(main(sys.argv[1:]))

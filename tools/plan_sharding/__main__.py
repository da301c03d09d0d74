import sys

from dlrm_scale.libraries import loading_libraries

with loading_libraries():
    from tools.plan_sharding.cli import main

sys.exit(main())

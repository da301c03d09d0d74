import sys

from dlrm_scale.training.main import quiet_libraries

quiet_libraries()

from tools.checkpoint.cli import main  # noqa: E402

sys.exit(main())

"""Starts the doctor, or says why it cannot: an older Python cannot even read the rest of it."""

import sys

if sys.version_info < (3, 11):  # noqa: UP036
    sys.exit(
        f"fault  python  {sys.version.split()[0]}, but this project runs on Python 3.11\n"
        "       -> rm -rf .venv && make install PYTHON=python3.11"
    )

from tools.doctor.cli import main

sys.exit(main())

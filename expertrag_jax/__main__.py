"""``python -m expertrag_jax <command>`` is ``expertrag <command>``."""

import sys

from expertrag_jax.main import main

if __name__ == "__main__":
    sys.exit(main())

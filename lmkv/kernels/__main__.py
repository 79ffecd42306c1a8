"""python -m lmkv.kernels: what is loaded, and whether it is right."""

import sys

from lmkv.errors import LmkvError

from . import selftest


def main() -> int:
    try:
        print("\n".join(selftest()))  # noqa: T201
    except LmkvError as error:
        print(error, file=sys.stderr)  # noqa: T201
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

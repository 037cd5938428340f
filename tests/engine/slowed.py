"""Training with a pause after every step: `slowed SECONDS --config ...`."""

import os
import sys
import time

from ds_dgemma import train


def main(seconds: float, arguments: list[str]) -> int:
    """Train; the exit code."""
    update = train.update

    def slow_update(*given):
        metrics = update(*given)
        time.sleep(seconds)
        return metrics

    train.update = slow_update
    return train.main(arguments)


if __name__ == "__main__":
    code = main(float(sys.argv[1]), sys.argv[2:])
    sys.stdout.flush()
    os._exit(code)

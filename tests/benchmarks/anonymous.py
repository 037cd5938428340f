"""How much memory of its own a process holds: pages of files, which can be dropped at any time, left out."""

import threading
import time
from pathlib import Path


def anonymous_bytes() -> int:
    """Memory of this process that no file backs."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise SystemExit("/proc/self/status has no RssAnon: this benchmark needs Linux.")


class PeakAnonymous:
    """Sample `anonymous_bytes` every few milliseconds inside a `with`."""

    def __enter__(self) -> "PeakAnonymous":
        self.peak, self.longest_gap, self._stop = anonymous_bytes(), 0.0, threading.Event()
        self._thread = threading.Thread(target=self._sample)
        self._thread.start()
        return self

    def _sample(self) -> None:
        last = time.perf_counter()
        while not self._stop.wait(0.002):
            self.peak = max(self.peak, anonymous_bytes())
            now = time.perf_counter()
            self.longest_gap, last = max(self.longest_gap, now - last), now

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self.peak = max(self.peak, anonymous_bytes())

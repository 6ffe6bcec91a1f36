"""Processes that end with the one that started them, also when that one is killed without a chance to tell them."""

import os
import threading
import time

SECONDS_BETWEEN_LOOKS = 1.0


def end_with_parent() -> None:
    """From now on, ends this process within seconds when its parent is gone.

    `torchrun` puts its ranks in sessions of their own, and `kill -9` of it, or of the script around it, leaves them
    training. A second call of the same command would then write to the same folder as they do.
    """
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(SECONDS_BETWEEN_LOOKS)
        os._exit(1)

    threading.Thread(target=watch, name="watchdog", daemon=True).start()

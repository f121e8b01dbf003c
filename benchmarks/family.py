"""A process and all its children: stopped while another one is measured, continued, and ended together."""

import contextlib
import os
import signal
import subprocess


class Family:
    """process: started with a session of its own (start_new_session), which is what makes it a family."""

    process: subprocess.Popen

    def rest(self) -> None:
        """Stop its threads, so that they do not spin beside another's."""
        self.signal(signal.SIGSTOP)

    def work(self) -> None:
        self.signal(signal.SIGCONT)

    def signal(self, which: signal.Signals) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, which)

    def close(self) -> None:
        self.signal(signal.SIGKILL)
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):  # what was not written yet: nobody reads it any more
                    pipe.close()

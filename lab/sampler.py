"""What the machine did meanwhile: CPU, memory and GPU, sampled by a thread while a block runs."""

import contextlib
import os
import sys
import threading
import time
from dataclasses import dataclass, field
from statistics import mean

import psutil


@dataclass
class Usage:
    """Samples of one measured block. cpu: cores in use by this process. rss: bytes. gpu*: None when there is no GPU."""

    cpu_cores: list[float] = field(default_factory=list)
    rss_bytes: list[int] = field(default_factory=list)
    gpu_percent: list[float] = field(default_factory=list)
    gpu_bytes: list[int] = field(default_factory=list)
    gpu_watts: list[float] = field(default_factory=list)
    gpu_missing: str | None = None
    probe_bytes: int = 0  # of the resident memory, what the bandwidth probe holds

    def summary(self) -> dict:
        """Means and peaks; None where nothing was sampled."""
        return {
            "cpu_cores_mean": mean(self.cpu_cores) if self.cpu_cores else None,
            "rss_peak_bytes": max(self.rss_bytes, default=None),
            "probe_bytes": self.probe_bytes,
            "gpu_percent_mean": mean(self.gpu_percent) if self.gpu_percent else None,
            "gpu_peak_bytes": max(self.gpu_bytes, default=None),
            "gpu_watts_mean": mean(self.gpu_watts) if self.gpu_watts else None,
            "gpu_missing": self.gpu_missing,
            "samples": len(self.rss_bytes),
        }


class Sampler:
    """with Sampler(usage): adds a sample to usage every interval_s until the block ends.

    A sample costs about 0.1 ms of one core, so ten a second take 0.1 % of it.
    """

    def __init__(self, usage: Usage, gpu_uuid: str | None = None, interval_s: float = 0.1) -> None:
        self.interval_s = interval_s
        self.usage = usage
        self.process = psutil.Process()
        self.gpu, self.handle, self.usage.gpu_missing = open_gpu(gpu_uuid)
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self.loop, name="sampler", daemon=True)

    def __enter__(self) -> Usage:
        self.before = self.cpu_s(), time.perf_counter()
        self.sample_memory()
        self.thread.start()
        return self.usage

    def __exit__(self, *exc: object) -> None:
        self.stop.set()
        self.thread.join()
        self.sample()
        if self.gpu is not None:
            self.gpu.nvmlShutdown()

    def loop(self) -> None:
        while not self.stop.wait(self.interval_s):
            self.sample()

    def cpu_s(self) -> float:
        times = self.process.cpu_times()
        return times.user + times.system

    def sample(self) -> None:
        cpu, now = self.cpu_s(), time.perf_counter()
        if now - self.before[1] >= self.interval_s / 2:  # CPU time is counted in steps of 10 ms: too short says nothing
            self.usage.cpu_cores.append((cpu - self.before[0]) / (now - self.before[1]))
            self.before = cpu, now
        self.sample_memory()
        if self.gpu is not None:
            self.sample_gpu()

    def sample_gpu(self) -> None:
        """Each figure on its own: partitioned and virtual GPUs answer some questions and refuse others."""
        with contextlib.suppress(self.gpu.NVMLError):
            self.usage.gpu_percent.append(float(self.gpu.nvmlDeviceGetUtilizationRates(self.handle).gpu))
        with contextlib.suppress(self.gpu.NVMLError):
            self.usage.gpu_bytes.append(int(self.gpu.nvmlDeviceGetMemoryInfo(self.handle).used))
        with contextlib.suppress(self.gpu.NVMLError):
            self.usage.gpu_watts.append(self.gpu.nvmlDeviceGetPowerUsage(self.handle) / 1e3)

    def sample_memory(self) -> None:
        self.usage.rss_bytes.append(self.process.memory_info().rss)


def open_gpu(uuid: str | None):
    """(pynvml, the GPU's handle, None), or (None, None, the reason why there is nothing to sample)."""
    import pynvml

    try:
        pynvml.nvmlInit()
        if uuid is None:
            pynvml.nvmlShutdown()
            return None, None, "this run used the CPU"
        return pynvml, pynvml.nvmlDeviceGetHandleByUUID(uuid), None
    except pynvml.NVMLError as error:
        return None, None, f"no NVIDIA driver answers ({error})"


def process_age_s() -> float:
    """Seconds since this process was created, to about 10 ms.

    psutil's create_time() is rounded to a second on Linux, because the kernel gives the time of boot in seconds.
    """
    if sys.platform == "linux":
        with open("/proc/self/stat") as file:
            ticks = int(file.read().rsplit(")", 1)[1].split()[19])
        return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    return time.time() - psutil.Process().create_time()

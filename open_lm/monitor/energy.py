"""Measure or estimate the energy that the devices of a run use.

A meter is read at log lines and never makes the host wait for the device. `is_estimate` tells whether the energy is
computed from nominal powers; `method` says how.
"""

from __future__ import annotations

import ctypes
import logging
import resource
import time
from contextlib import suppress
from importlib import metadata
from typing import Any, Protocol

import torch

from open_lm.config.devices import tdp_watts
from open_lm.distributed.processes import Runtime
from open_lm.errors import ConfigError, missing_package

# Power of a busy core with its share of the processor: 280 W / 64 cores of an EPYC 7763, 270 W / 40 cores of a Xeon
# 8380, 350 W / 60 cores of a Xeon 8490H (data sheets) are 4.4, 6.8 and 5.8 W.
CPU_CORE_WATTS = 5.5
_NVML_LIBRARY = "libnvidia-ml.so.1"
JOULES_PER_KWH = 3.6e6


class EnergyMeter(Protocol):
    """A counter of energy since its creation.

    Attributes:
        method: how the energy is found, for people.
        is_estimate: whether it is not measured.
    """

    method: str
    is_estimate: bool

    def joules(self) -> float:
        """Return the energy so far."""

    def close(self) -> None:
        """Stop to measure; `joules` remains valid."""


class _Meter:
    """A meter that needs no end."""

    method, is_estimate = "", True

    def close(self) -> None:
        """Do nothing."""


class CpuEstimate(_Meter):
    """The CPU time of this process, and of its child processes that have ended, times the power of a core."""

    method = f"CPU time of the ranks times {CPU_CORE_WATTS} W per core"

    def __init__(self) -> None:
        self._start = self._seconds()

    def joules(self) -> float:
        return (self._seconds() - self._start) * CPU_CORE_WATTS

    @staticmethod
    def _seconds() -> float:
        usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        return sum(usage.ru_utime + usage.ru_stime for usage in usages)


class DeviceEstimate(_Meter):
    """The time since the start times the thermal design power of a device."""

    def __init__(self, watts: float) -> None:
        self.method = f"time times the thermal design power of {watts:g} W per device"
        self._watts, self._start = watts, time.monotonic()

    def joules(self) -> float:
        return (time.monotonic() - self._start) * self._watts


class NvmlCounter(_Meter):
    """The energy counter of an NVIDIA device (Volta and later), read through its driver's library.

    Raises:
        OSError: the driver or the device has no such counter.
    """

    method, is_estimate = "energy counters of the devices (NVML)", False

    def __init__(self, uuid: str, library: str = _NVML_LIBRARY) -> None:
        self._nvml = ctypes.CDLL(library)
        self._device = ctypes.c_void_p()
        self._check(self._nvml.nvmlInit_v2())
        self._check(self._nvml.nvmlDeviceGetHandleByUUID(uuid.encode(), ctypes.byref(self._device)))
        self._start = self._millijoules()
        self._last = self._start

    def joules(self) -> float:
        with suppress(OSError):  # the device is lost; the run will find out
            self._last = self._millijoules()
        return (self._last - self._start) / 1000

    def _millijoules(self) -> int:
        value = ctypes.c_ulonglong()
        self._check(self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._device, ctypes.byref(value)))
        return value.value

    @staticmethod
    def _check(code: int) -> None:
        if code:
            raise OSError(f"NVML returned the error {code}")


class CodecarbonMeter:
    """codecarbon's offline tracker: processors, memory and devices of this machine, measured every 15 s in a thread.

    It writes no file and uses no network. One rank of each machine has one.
    """

    is_estimate = True  # without access to the counters of processors it uses nominal powers

    def __init__(self) -> None:
        try:
            from codecarbon import OfflineEmissionsTracker
            from codecarbon.output_methods.base_output import BaseOutput
        except ImportError as error:
            raise ConfigError(
                f"--energy codecarbon: {missing_package('codecarbon') or error}, or choose --energy device"
            ) from error

        class Reading(BaseOutput):
            kwh = 0.0

            def out(self, total: Any, delta: Any) -> None:
                self.kwh = float(total.energy_consumed)

            live_out = out

        logging.getLogger("codecarbon").setLevel(logging.ERROR)
        self._reading = Reading()
        self._tracker: Any = OfflineEmissionsTracker(
            country_iso_code="USA",  # required, but only emissions depend on it, which are not recorded
            output_methods=[],
            output_handlers=[self._reading],
            api_call_interval=1,
            log_level="error",
            allow_multiple_runs=True,
        )
        self._tracker.start()
        self.method = f"codecarbon {metadata.version('codecarbon')}: processors, memory and devices of the machines"

    def joules(self) -> float:
        return self._reading.kwh * JOULES_PER_KWH

    def close(self) -> None:
        try:
            self._tracker.stop()
        except Exception as error:  # the run does not depend on its energy
            logging.warning(f"codecarbon cannot end its measurement: {type(error).__name__}: {error}")


class NoMeter(_Meter):
    """The meter of a rank whose energy the first rank of its machine measures."""

    def __init__(self, method: str) -> None:
        self.method = method

    def joules(self) -> float:
        return 0.0


def open_meter(kind: str, runtime: Runtime) -> EnergyMeter | None:
    """Return the meter of this rank; None if its energy is unknown or not wanted.

    Args:
        kind: the value of --energy.
        runtime: this rank and its device.
    """
    if kind == "none":
        return None
    if kind == "codecarbon":
        return CodecarbonMeter() if runtime.local_rank == 0 else NoMeter("codecarbon")
    if runtime.device.type != "cuda":
        return CpuEstimate()
    properties = torch.cuda.get_device_properties(runtime.device)
    with suppress(OSError, AttributeError):  # no driver library, no counter, or part of a device
        return NvmlCounter(f"GPU-{properties.uuid}")
    watts = tdp_watts(properties.name)
    return None if watts is None else DeviceEstimate(watts)

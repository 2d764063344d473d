"""Core metrics of NVIDIA GPUs through NVML (`nvidia-ml-py`).

A call that a device or driver does not support is learnt once and its columns are NULL from then on. Each GPU has its
own daemon thread with a deadline, so one that hangs is reported `down` while the others go on.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from gpuledger.agents.batch import Cell
from gpuledger.agents.collectors.interface import DeviceInfo, Row
from gpuledger.agents.collectors.watched import CallHung, Watched
from gpuledger.schemas.telemetry import DownCause

__all__ = ["NvmlCollector", "NvmlUnavailable"]

log = logging.getLogger(__name__)

#: All GPUs together answer one sample within this, or count as hung. A healthy sample takes a few milliseconds.
DEADLINE_S = 2.0
START_DEADLINE_S = 20.0

#: One thread for what is not about one GPU, for all attempts of the process: those on a hung driver do not pile up.
_STARTER = Watched("nvml")

Reader = Callable[[Any, Any], dict[str, Cell]]


class NvmlUnavailable(Exception):
    """There is no NVIDIA driver here, or it does not answer; the text says which."""


# Each reader is one NVML call and the columns that come of it: the unit that can be unsupported.


def _utilisation(nvml: Any, handle: Any) -> dict[str, Cell]:
    rates = nvml.nvmlDeviceGetUtilizationRates(handle)
    return {"gpu_util_pct": float(rates.gpu), "mem_util_pct": float(rates.memory)}


def _memory(nvml: Any, handle: Any) -> dict[str, Cell]:
    memory = nvml.nvmlDeviceGetMemoryInfo(handle, version=nvml.nvmlMemory_v2)
    return {
        "memory_used_bytes": int(memory.used),
        "memory_reserved_bytes": int(memory.reserved),
        "memory_total_bytes": int(memory.total),
    }


def _energy(nvml: Any, handle: Any) -> dict[str, Cell]:
    return {"energy_mj": int(nvml.nvmlDeviceGetTotalEnergyConsumption(handle))}


def _power(nvml: Any, handle: Any) -> dict[str, Cell]:
    return {"power_mw": int(nvml.nvmlDeviceGetPowerUsage(handle))}


def _power_limit(nvml: Any, handle: Any) -> dict[str, Cell]:
    return {"power_limit_mw": int(nvml.nvmlDeviceGetEnforcedPowerLimit(handle))}


def _temperature(nvml: Any, handle: Any) -> dict[str, Cell]:
    return {"temperature_gpu_c": float(nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU))}


def _fan(nvml: Any, handle: Any) -> dict[str, Cell]:
    return {"fan_pct": float(nvml.nvmlDeviceGetFanSpeed(handle))}


def _sm_clock(nvml: Any, handle: Any) -> dict[str, Cell]:
    return {"sm_clock_mhz": int(nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM))}


def _memory_clock(nvml: Any, handle: Any) -> dict[str, Cell]:
    return {"memory_clock_mhz": int(nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_MEM))}


def _reasons(nvml: Any, handle: Any) -> dict[str, Cell]:
    return {"clocks_event_reasons": int(nvml.nvmlDeviceGetCurrentClocksEventReasons(handle))}


def _encoder(nvml: Any, handle: Any) -> dict[str, Cell]:
    return {"encoder_util_pct": float(nvml.nvmlDeviceGetEncoderUtilization(handle)[0])}


def _decoder(nvml: Any, handle: Any) -> dict[str, Cell]:
    return {"decoder_util_pct": float(nvml.nvmlDeviceGetDecoderUtilization(handle)[0])}


def _ecc_corrected(nvml: Any, handle: Any) -> dict[str, Cell]:
    kind, counter = nvml.NVML_MEMORY_ERROR_TYPE_CORRECTED, nvml.NVML_VOLATILE_ECC
    return {"ecc_corrected": int(nvml.nvmlDeviceGetTotalEccErrors(handle, kind, counter))}


def _ecc_uncorrected(nvml: Any, handle: Any) -> dict[str, Cell]:
    kind, counter = nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, nvml.NVML_VOLATILE_ECC
    return {"ecc_uncorrected": int(nvml.nvmlDeviceGetTotalEccErrors(handle, kind, counter))}


def _remapped(nvml: Any, handle: Any) -> dict[str, Cell]:
    corrected, uncorrected, pending, _ = nvml.nvmlDeviceGetRemappedRows(handle)
    return {
        "remapped_corrected": int(corrected),
        "remapped_uncorrected": int(uncorrected),
        "remap_pending": int(bool(pending)),
    }


def _compute_pids(nvml: Any, handle: Any) -> list[int]:
    """The pids with a compute context; older drivers know only the older call."""
    try:
        found = nvml.nvmlDeviceGetComputeRunningProcesses_v3(handle)
    except nvml.NVMLError as error:
        if error.value != nvml.NVML_ERROR_FUNCTION_NOT_FOUND:
            raise
        found = nvml.nvmlDeviceGetComputeRunningProcesses_v2(handle)
    return sorted({int(process.pid) for process in found})


def _process_count(nvml: Any, handle: Any) -> dict[str, Cell]:
    return {"processes": len(_compute_pids(nvml, handle))}


READERS: tuple[Reader, ...] = (
    _utilisation,
    _memory,
    _energy,
    _power,
    _power_limit,
    _temperature,
    _fan,
    _sm_clock,
    _memory_clock,
    _reasons,
    _encoder,
    _decoder,
    _ecc_corrected,
    _ecc_uncorrected,
    _remapped,
    _process_count,
)


class _Gpu:
    """One device: its handle, its thread, and which readers it supports."""

    def __init__(self, info: DeviceInfo, handle: Any) -> None:
        self.info = info
        self.handle = handle
        self.thread = Watched(f"nvml-{info.index}")
        self.readers = list(READERS)

    def read(self, nvml: Any) -> dict[str, Cell]:
        """Every supported column. Raises NVMLError where the device or the driver is gone."""
        row: dict[str, Cell] = {}
        for reader in list(self.readers):
            try:
                row.update(reader(nvml, self.handle))
            except nvml.NVMLError as error:
                if _is_gone(nvml, error):
                    raise
                if _is_unsupported(nvml, error):
                    self.readers.remove(reader)
                    log.info("GPU %d: %s is not supported (%s)", self.info.index, reader.__name__.strip("_"), error)
            except Exception as error:
                # nvidia-ml-py does not know the call, or driver and library disagree on its layout: the other calls
                # must go on.
                self.readers.remove(reader)
                log.warning("GPU %d: %s cannot be read: %r", self.info.index, reader.__name__.strip("_"), error)
        return row


def _is_unsupported(nvml: Any, error: Any) -> bool:
    """Whether the call will never work here; anything else (no data yet, busy) is NULL this once."""
    return error.value in (
        nvml.NVML_ERROR_NOT_SUPPORTED,
        nvml.NVML_ERROR_FUNCTION_NOT_FOUND,
        nvml.NVML_ERROR_NO_PERMISSION,
        nvml.NVML_ERROR_INVALID_ARGUMENT,
        nvml.NVML_ERROR_ARGUMENT_VERSION_MISMATCH,
    )


def _is_gone(nvml: Any, error: Any) -> bool:
    return _down_cause(nvml, error) is not None


def _down_cause(nvml: Any, error: Any) -> DownCause | None:
    """Why the device does not answer, None where the error is about one call only."""
    if error.value == nvml.NVML_ERROR_GPU_IS_LOST:
        return DownCause.LOST
    if error.value in (
        nvml.NVML_ERROR_UNINITIALIZED,
        nvml.NVML_ERROR_DRIVER_NOT_LOADED,
        nvml.NVML_ERROR_RESET_REQUIRED,
        nvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH,
    ):
        return DownCause.DRIVER
    return None


class NvmlCollector:
    """The GPUs that NVML shows on this node, in PCI order."""

    name = "nvml"

    def __init__(self, deadline_s: float = DEADLINE_S) -> None:
        """Loads the library and finds the devices.

        Raises:
            NvmlUnavailable: no library, no driver, or no answer in time.
        """
        self._deadline_s = deadline_s
        try:
            self._nvml, self._gpus, self._versions = _STARTER.call(_start, START_DEADLINE_S)
        except CallHung as error:
            raise NvmlUnavailable(f"the NVIDIA driver does not answer: {error}") from error

    def devices(self) -> Sequence[DeviceInfo]:
        return [gpu.info for gpu in self._gpus]

    def versions(self) -> Mapping[str, str]:
        return self._versions

    def refresh(self) -> bool:
        """Only a device that went away and came back as another is seen: handles are looked up again by UUID."""
        before = self.devices()
        try:
            found = _STARTER.call(lambda: _find(self._nvml), self._deadline_s)
        except (CallHung, NvmlUnavailable):
            return False
        known = {gpu.info: gpu for gpu in self._gpus}
        listed = {gpu.info.gpu for gpu in found}
        # A GPU that the driver no longer lists stays, and its samples say that it is down: silence is no record.
        missing = [gpu for gpu in self._gpus if gpu.info.gpu not in listed]
        self._gpus = [known.get(gpu.info, gpu) for gpu in found] + missing
        return list(self.devices()) != list(before)

    def sample(self) -> Sequence[Row]:
        waits = [gpu.thread.start(self._reader_of(gpu)) for gpu in self._gpus]
        until = time.monotonic() + self._deadline_s
        return [self._row(wait, until) for wait in waits]

    def _reader_of(self, gpu: _Gpu) -> Callable[[], dict[str, Cell]]:
        return lambda: gpu.read(self._nvml)

    def _row(self, wait: Callable[[float], dict[str, Cell]], until: float) -> Row:
        try:
            return wait(until - time.monotonic())
        except CallHung:
            return {"down_cause": int(DownCause.HUNG)}
        except self._nvml.NVMLError as error:
            return {"down_cause": int(_down_cause(self._nvml, error) or DownCause.DRIVER)}

    def processes(self) -> Mapping[str, Sequence[int]]:
        found: dict[str, Sequence[int]] = {}
        waits = [(gpu, gpu.thread.start(self._processes_of(gpu))) for gpu in self._gpus]
        until = time.monotonic() + self._deadline_s
        for gpu, wait in waits:
            try:
                found[gpu.info.gpu] = wait(until - time.monotonic())
            except (CallHung, self._nvml.NVMLError):
                continue
        return found

    def _processes_of(self, gpu: _Gpu) -> Callable[[], list[int]]:
        return lambda: _compute_pids(self._nvml, gpu.handle)

    def close(self) -> None:
        for gpu in self._gpus:
            gpu.thread.close()


def _start() -> tuple[Any, list[_Gpu], dict[str, str]]:
    try:
        import pynvml
    except ImportError as error:
        raise NvmlUnavailable(f"nvidia-ml-py is not installed ({error})") from error
    # Its functions come from a driver at run time: what they return is untyped by nature.
    nvml: Any = pynvml
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as error:
        raise NvmlUnavailable(f"NVML does not start: {error}") from error
    versions: dict[str, str] = {}
    try:
        versions["driver"] = _text(nvml.nvmlSystemGetDriverVersion())
        cuda = int(nvml.nvmlSystemGetCudaDriverVersion_v2())
        versions["cuda"] = f"{cuda // 1000}.{cuda % 1000 // 10}"
    except nvml.NVMLError as error:
        log.info("the driver does not tell its version: %s", error)
    return nvml, _find(nvml), versions


def _find(nvml: Any) -> list[_Gpu]:
    try:
        count = int(nvml.nvmlDeviceGetCount())
    except nvml.NVMLError as error:
        raise NvmlUnavailable(f"NVML does not list devices: {error}") from error
    gpus: list[_Gpu] = []
    for index in range(count):
        try:
            handle = nvml.nvmlDeviceGetHandleByIndex(index)
            gpus.append(_Gpu(_describe(nvml, handle, index), handle))
        except nvml.NVMLError as error:
            log.error("GPU %d cannot be opened and is not reported: %s", index, error)
    return gpus


def _describe(nvml: Any, handle: Any, index: int) -> DeviceInfo:
    def ask(call: Callable[[], Any]) -> Any:
        try:
            return call()
        except (nvml.NVMLError, AttributeError):
            return None

    pci = ask(lambda: nvml.nvmlDeviceGetPciInfo(handle))
    serial = ask(lambda: nvml.nvmlDeviceGetSerial(handle))
    memory = ask(lambda: nvml.nvmlDeviceGetMemoryInfo(handle, version=nvml.nvmlMemory_v2))
    return DeviceInfo(
        gpu=_text(nvml.nvmlDeviceGetUUID(handle)),
        index=index,
        model=_text(ask(lambda: nvml.nvmlDeviceGetName(handle)) or ""),
        pci_bus_id=_text(pci.busId).lower() if pci is not None else None,
        serial=_text(serial) if serial else None,
        memory_total_bytes=int(memory.total) if memory is not None else None,
    )


def _text(value: Any) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)

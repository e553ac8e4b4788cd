"""A CPU platform for verl 0.9.1, so that its engine runs without an accelerator (gloo, FSDP2).

Load it into every process with ``VERL_USE_EXTERNAL_MODULES=cpu_platform VERL_PLATFORM=cpu
VERL_ENGINE_DEVICE=cuda`` and this folder on ``PYTHONPATH``. For tests and for trying a
configuration; not for training.
"""

import contextlib
import types

import torch
from verl.plugin.platform import PlatformBase, PlatformRegistry


class _Device(types.ModuleType):
    """What verl calls on ``torch.cuda``: memory is 0, everything else does nothing."""

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *args, **kwargs: 0 if "memory" in name else None

    def get_device_name(self, *args):
        return "CPU"

    def mem_get_info(self, *args):
        return 0, 0


@PlatformRegistry.register(platform="cpu")
class PlatformCPU(PlatformBase):
    """Everything on the host."""

    device_name = "cpu"
    vendor_name = "cpu"
    device_module = _Device("cpu")

    def is_available(self):
        return True

    def current_device(self):
        return "cpu"

    def device_count(self):
        return 1

    def set_device(self, device_index):
        pass

    def synchronize(self, device_index=None):
        pass

    def manual_seed(self, seed):
        torch.manual_seed(seed)

    manual_seed_all = manual_seed

    def set_allocator_settings(self, settings):
        pass

    def empty_cache(self):
        pass

    def get_device_capability(self, device_index=0):
        return None, None

    def communication_backend_name(self):
        return "gloo"

    def visible_devices_envvar(self):
        return "CUDA_VISIBLE_DEVICES"

    @contextlib.contextmanager
    def nvtx_range(self, msg):
        yield

    def profiler_start(self):
        pass

    profiler_stop = profiler_start

    def ray_resource_name(self):
        return "CPU"

    def ray_resource_options(self, num_gpus):
        return {"num_cpus": num_gpus}

    def ray_noset_envvars(self):
        return []

    def is_ipc_supported(self):
        return False

    def cudart(self):
        return None

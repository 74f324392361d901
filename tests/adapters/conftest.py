"""Eight devices for JAX in the processes that run these tests, where it has not started yet."""

from __future__ import annotations

import os

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")

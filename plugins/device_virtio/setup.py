"""The extension is optional: without a compiler the package installs all the same and does its work in Python."""

import sys

from setuptools import Extension, setup

extensions = []
if sys.platform == "linux":
    extensions.append(
        Extension(
            "vmf_device_virtio._ring",
            ["src/vmf_device_virtio/_ring.c"],
            extra_compile_args=["-O2", "-std=gnu11", "-Wall", "-Wextra", "-fvisibility=hidden"],
            optional=True,
        )
    )

setup(ext_modules=extensions)
